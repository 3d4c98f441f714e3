"""Stage 1: supervised fine-tuning on trl.SFTTrainer (InstructGPT §3.5, C.1, C.3)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from instructgpt_hf._compat.quirks import keep_trained_weights
from instructgpt_hf._compat.trainers import SupervisedTrainer
from instructgpt_hf.config.training import SFTConfig

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


class SFTTrainer(SupervisedTrainer):
    """trl.SFTTrainer on token ids and labels from `instructgpt_hf.data.demonstrations`.

    | TRL's and the Trainer's | this package's |
    |---|---|
    | the loss, its metrics, collation | tokenization, before training, with every stage's prompt rendering |
    | training loop, mixed precision, DeepSpeed, FSDP | residual dropout (C.1): `set_residual_dropout` |
    | PEFT, quantised models | trained weights that TRL would round to bfloat16 stay as they are |
    | the evaluation loop | loss, entropy and accuracy as means over tokens, whatever the batches |
    | checkpoints, `push_to_hub` | whole folders; private, without TRL's model card |
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: SFTConfig, **kwargs: Any) -> None:
        with keep_trained_weights(model):
            super().__init__(model=model, args=args, **kwargs)
        self._evaluated: list[Tensor] = []  # [demonstrations of all processes, 4] of every batch

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
