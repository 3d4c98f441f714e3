"""Stage 2: from the SFT model and rankings to the reward model (InstructGPT §3.5, C.2)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.artifacts import EVALUATION_FILES
from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.demonstrations import demonstration_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import DROPPED, tokenize_rankings
from instructgpt_hf.data.rows import Tokenized
from instructgpt_hf.data.splits import Source, Split, hold_back, prompt_keys, read_rankings
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.plots.reward_model import draw_rankings
from instructgpt_hf.evaluation.reward_model.evaluate import evaluate_rankings, flat_metrics, labeler_agreement
from instructgpt_hf.models.loading import check_adapter_settings, load_config, load_tokenizer
from instructgpt_hf.models.origins import base_model_folder
from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model
from instructgpt_hf.models.scoring import reward_shift, score_token_lists
from instructgpt_hf.stages.inputs import (
    FinishedStage,
    base_record,
    check_vocabulary,
    model_options,
    model_record,
    previous_stage,
    recorded_format,
    usable_length,
)
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.stages.stage import Outcome, Stage
from instructgpt_hf.trainers.reward import RewardTrainer


class RewardInputs(NamedTuple):
    """Models and rows that stage 2 reads."""

    largest: Path  # folder of the model that becomes the reward model
    base: dict[str, Any]  # record of the pretrained model that it descends from
    sft: FinishedStage
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    rankings: Source  # in their canonical form
    demonstrations: list[dict[str, Any]] | None  # the SFT stage's, on which scores are centred; None if they are not


class RewardRows(NamedTuple):
    """Tokenized rankings and demonstrations."""

    rankings: Split
    dropped: dict[str, int]  # completions and prompts left out, by reason
    demonstrations: list[list[int]]  # token ids of prompt and completion; none if scores are not centred


class RewardStage(Stage[RewardInputs, RewardRows, PreTrainedModel | PeftModel]):
    """The reward model: the SFT model with a scalar head, trained on all pairs of K-way rankings."""

    def __init__(self, run: StageRun) -> None:
        super().__init__(run)
        self.measured: dict[str, Any] = {}  # the last evaluation, as `evaluate_rankings` returns it

    def read(self) -> RewardInputs:
        """The SFT stage, the model to start from, the rankings, and the demonstrations to centre on."""
        settings = self.run.settings
        data_args = settings.data_args
        sft = previous_stage(self.run, data_args.sft_model_path, "sft", data_args.sft_model_revision)
        start, base = self._start(sft)
        check_adapter_settings([start], settings.values, "reward.yaml")
        tokenizer = load_tokenizer(start)
        prompt_format = recorded_format(
            sft.record, settings.data_args.prompt_template, tokenizer, "reward.yaml: prompt_template"
        )
        rankings = read_rankings(self.sources, settings.data_args)
        self.run.log(f"read as {self.sources.records['rankings']['schema']}")
        demonstrations = self._demonstrations(sft) if settings.training_args.center_on_demonstrations else None
        return RewardInputs(start, base, sft, tokenizer, prompt_format, rankings, demonstrations)

    def _start(self, sft: FinishedStage) -> tuple[Path, dict[str, Any]]:
        """Folder and base record of the model to start from: `model_name_or_path` or, by default, the SFT model."""
        model_args = self.run.settings.model_args
        source, revision = model_args.model_name_or_path, model_args.model_revision
        if source is None:
            return sft.folder, sft.record.base_model
        folder = base_model_folder(source, revision, "model_name_or_path")
        load_config(folder)
        base = base_record(source, revision, folder, load_tokenizer(folder))
        check_vocabulary(sft.record.base_model, base, "the reward model")
        return folder, base

    def _demonstrations(self, sft: FinishedStage) -> list[dict[str, Any]] | None:
        """The first of the demonstrations that the SFT model was trained on; None where it was made elsewhere.

        Raises:
            InstructGPTError: if they are asked for and cannot be read.
        """
        if "demonstrations" not in sft.record.data:
            unknown = f"the demonstrations of {sft.source} are not known, because it was made elsewhere"
            if "center_on_demonstrations" in self.run.settings.values:
                raise InstructGPTError(f"center_on_demonstrations = True: {unknown}. Set it to false.")
            self.run.log(f"scores are not centred: {unknown}")
            return None
        try:
            dataset = self.sources.read_again(sft.record.data["demonstrations"], "demonstrations")
        except InstructGPTError as error:
            raise InstructGPTError(
                f"center_on_demonstrations = True: the SFT model's demonstrations cannot be read here ({error}). Put "
                "them there, or set center_on_demonstrations: false."
            ) from error
        dataset = demonstration_rows(dataset, "demonstrations")
        prompted = dataset.filter(lambda prompt: prompt is not None, input_columns=["prompt"])
        if len(prompted) == 0:
            raise InstructGPTError(
                "center_on_demonstrations = True: the SFT model's demonstrations are text without prompts. Set "
                "center_on_demonstrations: false."
            )
        limit = self.run.settings.training_args.center_num_demonstrations
        return list(prompted.select(range(min(limit, len(prompted)))))

    def fingerprints(self, inputs: RewardInputs) -> dict[str, Any]:
        """Fingerprints of the SFT stage and of the pretrained model."""
        return {"sft": inputs.sft.record.fingerprint, "base": inputs.base["fingerprint"]}

    def prepare(self, inputs: RewardInputs) -> RewardRows:
        """Token ids of rankings and demonstrations within the length limits."""
        settings, tokenizer, prompt_format = self.run.settings, inputs.tokenizer, inputs.prompt_format
        max_length: Any = usable_length(self.run, load_config(inputs.largest), settings.training_args.max_length)
        limits = {"max_length": max_length, "max_prompt_length": settings.data_args.max_prompt_length}
        source, test = inputs.rankings
        where, record = f"rankings: {settings.data_args.dataset_name}", self.sources.records["rankings"]

        def tokenize(rows: Dataset | IterableDataset, where: str) -> Tokenized:
            return tokenize_rankings(rows, prompt_format, tokenizer, where=where, **limits)

        tokenized = tokenize(source, where)
        if test is not None:
            rows = Split(tokenized.rows, tokenize(test, f"{where} (held back)").rows)
        else:
            rows = hold_back(tokenized.rows, prompt_keys(source.select(tokenized.kept)["prompt"]), where)
            record["held_back"] = len(rows.test)
        self.run.log(f"{len(rows.test)} rankings held back")
        dropped = tokenized.counts
        if not isinstance(rows.train, IterableDataset):  # of a stream nothing is known before it is read
            left_out = ", ".join(f"{count} {DROPPED[name]}" for name, count in dropped.items() if count) or "nothing"
            completions = sum(map(len, rows.train["ranks"]))
            self.run.log(f"{len(rows.train)} prompts with {completions} completions; left out: {left_out}")
        return RewardRows(rows, dropped, _demonstration_ids(inputs, max_length))

    def load(self, inputs: RewardInputs) -> PreTrainedModel | PeftModel:
        """The start model with a fresh head."""
        settings = self.run.settings
        return create_reward_model(
            inputs.largest,
            inputs.tokenizer,
            seed=self.run.seed,
            peft_config=peft_config(settings.model_args, "SEQ_CLS"),
            **model_options(settings),
        )

    def trainer(self, inputs: RewardInputs, rows: RewardRows, models: PreTrainedModel | PeftModel) -> RewardTrainer:
        """TRL's trainer on K-way rankings; every evaluation leaves its result in `measured`."""
        return RewardTrainer(
            model=models,
            args=self.run.settings.training_args,
            train_dataset=rows.rankings.train,
            eval_dataset=rows.rankings.test,
            processing_class=inputs.tokenizer,
            compute_metrics=self._compute_metrics,
        )

    def _compute_metrics(self, result: EvalPrediction) -> dict[str, float]:
        self.measured.update(evaluate_rankings(result.predictions, result.label_ids, result.inputs))
        return {name.removeprefix("eval_"): value for name, value in flat_metrics(self.measured).items()}

    def conclude(
        self,
        inputs: RewardInputs,
        rows: RewardRows,
        models: PreTrainedModel | PeftModel,
        trainer: RewardTrainer,
        training: dict[str, Any],
    ) -> Outcome:
        """Accuracy, calibration and length bias on held-back rankings; scores centred on demonstrations."""
        model, tokenizer, measured = models, inputs.tokenizer, self.measured
        trainer.evaluate()
        self.sources.records["rankings"].update(rows.dropped)
        metrics: dict[str, Any] = {}
        if rows.demonstrations:
            batch_size = self.run.settings.training_args.per_device_eval_batch_size
            with self.run.measuring("centring scores on demonstrations"):
                scores = score_token_lists(model, rows.demonstrations, tokenizer.pad_token_id, batch_size)
            unwrap_peft(model).config.reward_shift = sum(scores) / len(scores)
            metrics["demonstrations_scored"] = len(scores)
        train, test = inputs.rankings
        if "labeler" in (train.column_names or ()) and not isinstance(train, IterableDataset):
            measured["labelers"] = labeler_agreement(itertools.chain(train, test or []))
        metrics.update(flat_metrics(measured))
        record = {
            "prompt_format": inputs.prompt_format.to_dict(),
            "base_model": inputs.base,
            "previous": {"sft": inputs.sft.reference},
            "model": {**model_record(model, inputs.base), "reward_shift": reward_shift(model)},
            "metrics": metrics,
        }

        def save(folder: Path) -> None:
            save_reward_model(model, folder)
            inputs.prompt_format.save_tokenizer(tokenizer, folder)
            numbers, picture = (folder / name for name in EVALUATION_FILES)
            text = json.dumps(measured, indent=2, allow_nan=False) + "\n"
            numbers.write_text(text, encoding="utf-8")
            draw_rankings(measured, picture)

        summary = (
            f"held-back accuracy {metrics['eval_accuracy']:.3f} "
            f"({metrics['eval_accuracy_low']:.3f} to {metrics['eval_accuracy_high']:.3f}; by length alone "
            f"{metrics['length_baseline_accuracy']:.3f}), shift {reward_shift(model):+.3f}"
        )
        return Outcome(record, save, summary)


def _demonstration_ids(inputs: RewardInputs, max_length: int) -> list[list[int]]:
    """Token ids of the demonstrations within the reward model's length limit; none if scores are not centred."""
    if inputs.demonstrations is None:
        return []
    render, tokenizer = inputs.prompt_format, inputs.tokenizer
    ids = [
        render.prompt_ids(row["prompt"], tokenizer)
        + render.completion_ids(row["prompt"], row["completion"], tokenizer)
        for row in inputs.demonstrations
    ]
    kept = [item for item in ids if len(item) <= max_length]
    if not kept:
        raise InstructGPTError(
            f"center_on_demonstrations = True: every demonstration of the SFT model is longer than "
            f"max_length={max_length} tokens (the shortest has {min(map(len, ids))}). Raise max_length, or set "
            "center_on_demonstrations: false."
        )
    return kept
