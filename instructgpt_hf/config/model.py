"""Which model a stage loads, in which number format, and with which adapter."""

# ruff: noqa: RUF009  `changed` returns a dataclass field.
# mypy: disable-error-code="attr-defined, name-defined, call-arg, misc"
# TRL exports its names lazily, which mypy does not see.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import trl

from instructgpt_hf.config.device import native_precision
from instructgpt_hf.config.fields import Upstream, changed, not_in_recipes
from instructgpt_hf.config.ranges import AT_LEAST_ONE, FRACTION

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

_changed = partial(changed, trl.ModelConfig)


@dataclass
class ModelConfig(trl.ModelConfig):
    """TRL's `ModelConfig` with other defaults for LoRA and quantisation. The paper trains all weights.

    Differences: LoRA adapts every linear layer; no LoRA dropout, because PPO compares log-probabilities of the same
    tokens from several forward passes; 4-bit weights use double quantisation.
    """

    upstream: ClassVar[Mapping[str, Upstream]] = {
        "lora_alpha": Upstream(AT_LEAST_ONE),
        "lora_r": Upstream(AT_LEAST_ONE),
        "lora_task_type": not_in_recipes("is set by the stage"),
    }

    lora_target_modules: str | list[str] | None = _changed(
        "lora_target_modules", "all-linear", "ours: QLoRA (Dettmers et al. 2023) adapts all of them"
    )
    lora_dropout: float = _changed(
        "lora_dropout", 0.0, "ours: log-probabilities of PPO must not depend on the forward pass", FRACTION
    )
    use_bnb_nested_quant: bool = _changed("use_bnb_nested_quant", True, "ours: QLoRA (Dettmers et al. 2023)")


def peft_config(model_config: ModelConfig, task_type: str) -> LoraConfig | None:
    """The LoRA adapter of a stage, or None where all weights train.

    Args:
        model_config: the stage's model settings.
        task_type: `"CAUSAL_LM"`, or `"SEQ_CLS"` for reward and value models, whose scalar head is then trained and
            saved with the adapter.
    """
    saved = model_config.lora_modules_to_save
    if task_type == "SEQ_CLS":
        saved = sorted({*(saved or []), "score"})
    return trl.get_peft_config(replace(model_config, lora_task_type=task_type, lora_modules_to_save=saved))


def quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings for the frozen weights, or None where they are not quantised.

    4-bit weights compute in the device's native format; TRL would compute in the format of the other weights.
    """
    compute = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[native_precision()]
    return trl.get_quantization_config(replace(model_config, dtype=compute))
