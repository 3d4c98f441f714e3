"""Stage 1: supervised fine-tuning on trl.SFTTrainer (InstructGPT §3.5, C.1, C.3)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf._compat.quirks import keep_trained_weights
from instructgpt_hf._compat.trainers import SupervisedTrainer
from instructgpt_hf.config.training import SFTConfig
from instructgpt_hf.data.demonstrations import mix_pretraining
from instructgpt_hf.data.pretraining import PretrainingStream, pretraining_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.trainers.inputs import ModelSource, chosen_format, refuse, settled_args
from instructgpt_hf.trainers.rows import RowReader, each, training_rows

logger = logging.getLogger(__name__)

# Where each architecture keeps the dropout on its residual branches, and the other dropouts that the paper does not
# mention, which are switched off so that only the residual one acts.
RESIDUAL_DROPOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("resid_pdrop", ("attn_pdrop", "embd_pdrop")),
    "gptj": ("resid_pdrop", ("attn_pdrop", "embd_pdrop")),
    "gpt_neo": ("resid_dropout", ("attention_dropout", "embed_dropout")),
    "gpt_neox": ("hidden_dropout", ("attention_dropout",)),
    "opt": ("dropout", ("attention_dropout", "activation_dropout")),
    "phi": ("resid_pdrop", ("attention_dropout", "embd_pdrop")),
    "phi3": ("resid_pdrop", ("attention_dropout", "embd_pdrop")),
    "falcon": ("hidden_dropout", ("attention_dropout",)),
    "bloom": ("hidden_dropout", ("attention_dropout",)),
    "stablelm": ("hidden_dropout", ("attention_dropout",)),
}


def set_residual_dropout(config: PreTrainedConfig, probability: float) -> dict[str, Any] | None:
    """Set the residual dropout in a config, before the model is built from it; the paper's is 0.2 (C.1).

    Returns:
        The previous settings, for `restore_config` when the model is saved, or None if this architecture has no
        residual dropout; nothing is changed then.
    """
    if config.model_type not in RESIDUAL_DROPOUT:
        return None
    name, others = RESIDUAL_DROPOUT[config.model_type]
    before = {key: getattr(config, key) for key in (name, *others) if hasattr(config, key)}
    for key in before:
        setattr(config, key, probability if key == name else 0.0)
    return before


def restore_config(config: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Undo `set_residual_dropout`, so that later stages load the model with its own settings."""
    for key, value in before.items():
        setattr(config, key, value)


def _apply_residual_dropout(
    config: PreTrainedConfig, probability: float | None, is_loaded: bool
) -> dict[str, Any] | None:
    """Set the residual dropout of a model that is still to be loaded; what is loaded must have it already.

    Returns:
        The previous settings, or None if nothing was changed.

    Raises:
        InstructGPTError: if the model is in memory with another residual dropout.
    """
    if probability is None:
        return None
    if config.model_type not in RESIDUAL_DROPOUT:
        logger.warning(
            "residual_dropout = %s has no effect: %s has no residual dropout.", probability, config.model_type
        )
        return None
    if not is_loaded:
        return set_residual_dropout(config, probability)
    name = RESIDUAL_DROPOUT[config.model_type][0]
    if getattr(config, name) != probability:
        raise InstructGPTError(
            f"residual_dropout = {probability}: the model is in memory with {name} = {getattr(config, name)}; pass "
            "its id, so that it is built with this one."
        )
    return None


class SFTTrainer(SupervisedTrainer):
    """trl.SFTTrainer on demonstrations.

    | TRL's and the Trainer's | this package's |
    |---|---|
    | the loss, its metrics, collation | loading, tokenization with every stage's prompt rendering |
    | training loop, mixed precision, DeepSpeed, FSDP | residual dropout (C.1): `set_residual_dropout` |
    | PEFT, quantised models | trained weights that TRL would round to bfloat16 stay as they are |
    | the evaluation loop | loss, entropy and accuracy as means over tokens, whatever the batches |
    | checkpoints, `push_to_hub` | whole folders; private, without TRL's model card |

    Args:
        model: Hub id or folder of a causal language model, whole or adapter, or `"lab"`; or one in memory.
        args: `SFTConfig`. Demonstrations over `max_length` are left out, not cut.
        data_collator: in place of TRL's.
        train_dataset: demonstrations in any form of `data.demonstrations`, or `input_ids` and `labels`.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the tokenizer, the model's own by default.
        peft_config: of the adapter to train on a whole model.
        quantization_config: of the frozen weights of a model by its name.
        prompt_format: a `PromptFormat` or its name; by default the one that the model was trained with, the
            tokenizer's chat template, or without one the prompt as it is.
        pretraining_dataset: column `text`; needed for `args.pretraining_mix`.
        kwargs: for `trl.SFTTrainer`: callbacks, compute_metrics, optimizers, ...

    Raises:
        InstructGPTError: if model, data or settings cannot be used; before weights are loaded where possible.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        prompt_format: PromptFormat | str | None = None,
        pretraining_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = settled_args(args, SFTConfig, model, "SFT")
        refuse(kwargs, {"formatting_func": "apply it before: dataset.map(...) to the columns prompt and completion."})
        set_seed(args.seed)
        source = ModelSource(model, args, quantization_config)
        tokenizer, config = source.tokenizer(processing_class), source.config
        self.prompt_format = chosen_format(prompt_format, tokenizer, source.folder)
        self.reader = RowReader.of(self.prompt_format, tokenizer, config, args.max_length)
        train = training_rows(train_dataset, self.reader.demonstrations)
        if args.pretraining_mix and train is not train_dataset:
            train = self._mixed(train, pretraining_dataset, args, tokenizer)
        held_back = each(eval_dataset, "eval_dataset", self.reader.demonstrations)
        self._config_before = _apply_residual_dropout(config, args.residual_dropout, source.folder is None)
        model = source.policy(tokenizer, peft_config, config if self._config_before else None)
        with keep_trained_weights(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train,
                eval_dataset=held_back,
                processing_class=tokenizer,
                **kwargs,
            )
        self._evaluated: list[Tensor] = []  # [demonstrations of all processes, 4] of every batch

    def _mixed(
        self, rows: Dataset, texts: Dataset | None, args: SFTConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset:
        """The demonstrations with packed pretraining text among them."""
        if texts is None:
            raise InstructGPTError(
                f"pretraining_mix = {args.pretraining_mix}: needs pretraining_dataset, the text to mix in."
            )
        texts = pretraining_rows(texts, "pretraining_dataset")
        blocks = PretrainingStream(texts, tokenizer, self.reader.max_length, args.seed)
        return mix_pretraining(rows, blocks, args.pretraining_mix, args.seed)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; demonstrations are tokenized as those of the constructor."""
        return super().evaluate(each(eval_dataset, "eval_dataset", self.reader.demonstrations), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """The Trainer's prediction; demonstrations are tokenized as those of the constructor."""
        return super().predict(each(test_dataset, "test_dataset", self.reader.demonstrations), *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer, whose chat template renders as the training did; a model for use keeps its own
        settings of dropout.
        """
        if self._config_before is not None and not _internal_call:
            restore_config(unwrap_peft(self.model).config, self._config_before)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.prompt_format.save_tokenizer(self.processing_class, Path(output_dir or self.args.output_dir))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Any, Any]:
        """TRL's step on one batch of held-back demonstrations; their sums over tokens are kept."""
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            hook.remove()
        output = next(item for item in outputs if getattr(item, "label_mask", None) is not None)
        columns = (-output.log_probs, output.entropy, output.is_top1, output.label_mask)
        sums = torch.stack([column.detach().float().sum(1) for column in columns], dim=1)
        tokens = sums[:, 3]
        # What label smoothing, DFT or a router adds to the loss is known for the whole batch only.
        sums[:, 0] += (loss - sums[:, 0].sum() / tokens.sum().clamp(min=1)) * tokens
        self._evaluated.append(self.accelerator.gather_for_metrics(sums).double().cpu())
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """TRL's loop; then the means over all held-back tokens.

        The Trainer and TRL take means over batches, in which a token of a batch with few tokens counts more.
        """
        self._evaluated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        *sums, tokens = torch.cat(self._evaluated).sum(0).tolist()
        self._evaluated.clear()
        loss, entropy, accuracy = (item / max(tokens, 1.0) for item in sums)
        metrics = {"entropy": entropy, "mean_token_accuracy": accuracy}
        self.replace_recorded(metrics)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in (metrics | {"loss": loss}).items()})
        return output
