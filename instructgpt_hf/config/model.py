"""Which model a stage loads, in which number format, and with which adapter."""

# ruff: noqa: RUF009  `changed` returns a dataclass field.
# mypy: disable-error-code="attr-defined, name-defined"
# TRL exports its names lazily, which mypy does not see.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trl

from instructgpt_hf.config.device import native_precision
from instructgpt_hf.config.fields import changed

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


@dataclass
class ModelConfig(trl.ModelConfig):
    """TRL's `ModelConfig` with other defaults for LoRA and quantisation. The paper trains all weights.

    Differences: LoRA adapts every linear layer; no LoRA dropout, because PPO compares log-probabilities of the same
    tokens from several forward passes; 4-bit weights use double quantisation.
    """

    lora_target_modules: str | list[str] | None = changed(
        trl.ModelConfig, "lora_target_modules", "all-linear", "ours: QLoRA (Dettmers et al. 2023) adapts all of them"
    )
    lora_dropout: float = changed(
        trl.ModelConfig, "lora_dropout", 0.0, "ours: log-probabilities of PPO must not depend on the forward pass"
    )
    use_bnb_nested_quant: bool = changed(
        trl.ModelConfig, "use_bnb_nested_quant", True, "ours: QLoRA (Dettmers et al. 2023)"
    )


def peft_config(model_config: ModelConfig, task_type: str) -> LoraConfig | None:
    """The LoRA adapter of a stage, or None where all weights train.

    Args:
        task_type: `"CAUSAL_LM"`, or `"SEQ_CLS"` for reward and value models, whose scalar head is then trained and
            saved with the adapter.
    """
    if not model_config.use_peft:
        return None
    from peft import LoraConfig

    saved = model_config.lora_modules_to_save
    if task_type == "SEQ_CLS":
        saved = sorted({*(saved or []), "score"})
    return LoraConfig(
        task_type=task_type,
        r=model_config.lora_r,
        lora_alpha=model_config.lora_alpha,
        lora_dropout=model_config.lora_dropout,
        target_modules=model_config.lora_target_modules,
        target_parameters=model_config.lora_target_parameters,
        modules_to_save=saved,
        use_rslora=model_config.use_rslora,
        use_dora=model_config.use_dora,
        bias="none",
    )


def quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantises the frozen weights, or None. 4-bit weights compute in the device's native format."""
    if not (model_config.load_in_4bit or model_config.load_in_8bit):
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if model_config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[native_precision()]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_type=model_config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_config.bnb_4bit_quant_storage,
    )
