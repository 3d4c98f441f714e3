"""Stage 1: from a pretrained model and demonstrations to the SFT model (InstructGPT §3.5, C.1, C.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.demonstrations import Tokenized, mix_pretraining, tokenize_demonstrations
from instructgpt_hf.data.pretraining import PretrainingStream
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.splits import (
    Source,
    Split,
    demonstration_keys,
    hold_back,
    read_demonstration_source,
    read_pretraining,
)
from instructgpt_hf.metric_register import stage_metrics
from instructgpt_hf.models.loading import load_config, load_policy, load_tokenizer
from instructgpt_hf.models.origins import base_model_folder
from instructgpt_hf.stages.inputs import base_record, model_options, model_record, usable_length
from instructgpt_hf.stages.processes import whole_weights
from instructgpt_hf.stages.stage import Outcome, Stage
from instructgpt_hf.trainers.sft import SFTTrainer, restore_config, set_residual_dropout


class SFTInputs(NamedTuple):
    """The pretrained model and the texts that stage 1 reads."""

    largest: Path
    base: dict[str, Any]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    demonstrations: Source
    pretraining: Split | None


class SFTModel(NamedTuple):
    """The model to train, and the config settings that the residual dropout replaced (None if none was set)."""

    model: PreTrainedModel | PeftModel
    config_before: dict[str, Any] | None


class SFTStage(Stage[SFTInputs, Split, SFTModel]):
    """Supervised fine-tuning of a pretrained model on demonstrations, with pretraining text mixed in if wanted."""

    def read(self) -> SFTInputs:
        """The base model by `model_name_or_path`, its tokenizer, the demonstrations and the pretraining text."""
        data_args, model_args = self.run.settings.data_args, self.run.settings.model_args
        source, revision = model_args.model_name_or_path, model_args.model_revision
        folder = base_model_folder(source, revision, "model_name_or_path")
        config, tokenizer = load_config(folder), load_tokenizer(folder)
        prompt_format = PromptFormat.create(data_args.prompt_template, tokenizer)
        demonstrations = read_demonstration_source(self.sources, data_args)
        mix = self.run.settings.training_args.pretraining_mix
        pretraining = read_pretraining(self.sources, data_args, "pretraining_mix", mix)
        base = base_record(source, revision, folder, tokenizer)
        return SFTInputs(folder, base, config, tokenizer, prompt_format, demonstrations, pretraining)

    def fingerprints(self, inputs: SFTInputs) -> dict[str, Any]:
        """Fingerprint of the base model."""
        return {"base": inputs.base["fingerprint"]}

    def prepare(self, inputs: SFTInputs) -> Split:
        """Token ids and labels of the demonstrations, with packed pretraining text among those to train on."""
        run, training_args = self.run, self.run.settings.training_args
        max_length: Any = usable_length(run, inputs.config, training_args.max_length)
        limits = {"max_length": max_length, "max_prompt_length": run.settings.data_args.max_prompt_length}

        where = f"demonstrations: {run.settings.data_args.dataset_name}"

        def tokenize(rows: Dataset, where: str) -> Tokenized:
            return tokenize_demonstrations(rows, inputs.prompt_format, inputs.tokenizer, where=where, **limits)

        source, test = inputs.demonstrations
        tokenized = tokenize(source, where)
        rows, record = tokenized.rows, self.sources.records["demonstrations"]
        if test is not None:
            test_rows = tokenize(test, f"{where} (held back)").rows
        else:
            rows, test_rows = hold_back(rows, demonstration_keys(source.select(tokenized.kept)), where)
            record["held_back"] = len(test_rows)
        record.update(tokenized.counts)
        run.log(
            f"{len(rows)} demonstrations, {len(test_rows)} held back; left out: "
            f"{record['dropped_too_long']} over a length limit, {record['dropped_empty']} empty"
        )
        if inputs.pretraining is not None:
            blocks = PretrainingStream(inputs.pretraining.train, inputs.tokenizer, max_length, run.seed)
            demonstrated = len(rows)
            rows = mix_pretraining(rows, blocks, training_args.pretraining_mix, run.seed)
            self.sources.records["pretraining"]["examples"] = len(rows) - demonstrated
        return Split(rows, test_rows)

    def load(self, inputs: SFTInputs) -> SFTModel:
        """The base model, with the residual dropout and the adapter that the settings ask for."""
        settings, config, dropout = self.run.settings, inputs.config, self.run.settings.training_args.residual_dropout
        before = set_residual_dropout(config, dropout) if dropout is not None else None
        if dropout is not None and before is None:
            self.run.log(f"residual_dropout = {dropout} has no effect: {config.model_type} has no residual dropout")
        model = load_policy(
            inputs.largest,
            inputs.tokenizer,
            peft_config=peft_config(settings.model_args, "CAUSAL_LM"),
            config=config if before is not None else None,
            **model_options(settings),
        )
        return SFTModel(model, before)

    def trainer(self, inputs: SFTInputs, rows: Split, models: SFTModel) -> SFTTrainer:
        """TRL's trainer on the tokenized rows."""
        return SFTTrainer(
            model=models.model,
            args=self.run.settings.training_args,
            train_dataset=rows.train,
            eval_dataset=rows.test,
            processing_class=inputs.tokenizer,
        )

    def conclude(
        self, inputs: SFTInputs, rows: Split, models: SFTModel, trainer: SFTTrainer, training: dict[str, Any]
    ) -> Outcome:
        """Loss and token accuracy on the held-back demonstrations."""
        model, before = models
        recorded = {metric.name for metric in stage_metrics("sft") if metric.label}
        metrics = {key: value for key, value in trainer.evaluate().items() if key in recorded}
        record = {
            "prompt_format": inputs.prompt_format.to_dict(),
            "base_model": inputs.base,
            "model": {**model_record(model, inputs.base), "residual_dropout_applied": before is not None},
            "metrics": metrics,
        }
        if before is not None:
            restore_config(model.config, before)
        weights = whole_weights(trainer)

        def save(folder: Path) -> None:
            model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
            inputs.prompt_format.save_tokenizer(inputs.tokenizer, folder)

        return Outcome(record, save, f"held-back demonstrations: loss {metrics['eval_loss']:.3f} nats per token")
