"""The training settings of the three stages: TRL's configs with the paper's defaults and what TRL does not have.

Every field that this package adds or whose default it changes carries `metadata["source"]`: the section of the paper
(Ouyang et al. 2022, arXiv:2203.02155) that states the default, or "ours" where the paper states none. All other fields
are TRL's and transformers', with their defaults.
"""

# ruff: noqa: RUF009  `changed` returns a dataclass field.
# mypy: disable-error-code="attr-defined, name-defined, has-type, misc"
# TRL exports its names lazily, which mypy does not see.

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import trl
from transformers.trainer_utils import SchedulerType

from instructgpt_hf.config.device import native_precision
from instructgpt_hf.config.fields import changed, default_of, setting
from instructgpt_hf.config.rules import CHANGE_NOTHING, range_violation, violations
from instructgpt_hf.config.schema import refused_by_ppo_config
from instructgpt_hf.errors import Problems

_COSINE_TO_TENTH = {"min_lr_rate": 0.1}
_BETA2 = "App C"
_PRECISION = "ours: bf16 where the device computes it natively, fp16 on older CUDA devices, else float32"
_CHECKPOINTING = "ours: off; trades time for memory"
_DISK = "ours: the newest checkpoint is enough to resume"


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's `SFTConfig` with the paper's supervised fine-tuning (C.1).

    The defaults are those of the paper's SFT models. The paper starts RL from another one (C.3): 2 epochs,
    `pretraining_mix: 0.1` and a learning rate of its own (5e-6 for 1.3B, 1.04e-5 for 6B).
    """

    residual_dropout: float | None = setting(
        None,
        "Dropout on the residual branches, where the architecture has it; None leaves the model's own. The paper uses "
        "0.2 for its SFT models (C.1) and states none for the RL initialisation.",
        "ours: many architectures have none",
    )
    pretraining_mix: float = setting(
        0.0, "Fraction of the training examples that are pretraining text; 0.1 for the RL initialisation (C.3).", "C.1"
    )
    learning_rate: float = changed(trl.SFTConfig, "learning_rate", 9.65e-6, "C.1: 1.3B and 6B; 5.03e-6 for 175B")
    num_train_epochs: float = changed(trl.SFTConfig, "num_train_epochs", 16, "C.1; 2 for the RL initialisation (C.3)")
    per_device_train_batch_size: int = changed(trl.SFTConfig, "per_device_train_batch_size", 8, "C.1: batch of 32")
    gradient_accumulation_steps: int = changed(trl.SFTConfig, "gradient_accumulation_steps", 4, "C.1: batch of 32")
    lr_scheduler_type: SchedulerType | str = changed(trl.SFTConfig, "lr_scheduler_type", "cosine_with_min_lr", "C.1")
    lr_scheduler_kwargs: dict[str, Any] | str | None = changed(
        trl.SFTConfig, "lr_scheduler_kwargs", _COSINE_TO_TENTH, "C.1: cosine to 10 % of the peak"
    )
    warmup_steps: float = changed(trl.SFTConfig, "warmup_steps", 0, "C.1: no warmup")
    adam_beta2: float = changed(trl.SFTConfig, "adam_beta2", 0.95, _BETA2)
    max_length: int | None = changed(trl.SFTConfig, "max_length", 2048, "App C: context of 2k tokens")
    completion_only_loss: bool | None = changed(
        trl.SFTConfig, "completion_only_loss", True, "ours: the paper does not state it"
    )
    gradient_checkpointing: bool = changed(trl.SFTConfig, "gradient_checkpointing", False, _CHECKPOINTING)
    bf16: bool | None = changed(trl.SFTConfig, "bf16", None, _PRECISION)
    report_to: str | list[str] | None = changed(trl.SFTConfig, "report_to", "none", "ours")
    save_total_limit: int | None = changed(trl.SFTConfig, "save_total_limit", 1, _DISK)

    def __post_init__(self) -> None:
        _check(self, "sft")
        _before_upstream(self)
        super().__post_init__()


@dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's `RewardConfig` with the paper's reward model (§3.5, C.2).

    `per_device_train_batch_size` counts prompts, each with all of its ranked completions; memory is bounded by
    `max_tokens_per_forward`.
    """

    max_tokens_per_forward: int = setting(
        16_384,
        "Tokens of one forward and backward pass, padding included. The prompts of a micro-batch are sorted by length "
        "and go through the model in as many passes as they need; a ranking that exceeds one is computed in parts, at "
        "the price of another forward pass.",
        "ours: bounds memory",
    )

    center_on_demonstrations: bool = setting(
        True, "Shift the scores after training so that demonstrations score 0 on average.", "§3.5"
    )
    learning_rate: float = changed(trl.RewardConfig, "learning_rate", 9e-6, "C.2")
    num_train_epochs: float = changed(trl.RewardConfig, "num_train_epochs", 1, "C.2: more epochs overfit")
    per_device_train_batch_size: int = changed(
        trl.RewardConfig, "per_device_train_batch_size", 64, "C.2: batch of 64 prompts"
    )
    lr_scheduler_type: SchedulerType | str = changed(
        trl.RewardConfig, "lr_scheduler_type", "cosine_with_min_lr", "C.2"
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = changed(
        trl.RewardConfig, "lr_scheduler_kwargs", _COSINE_TO_TENTH, "C.2: cosine to 10 % of the peak"
    )
    adam_beta2: float = changed(trl.RewardConfig, "adam_beta2", 0.95, _BETA2)
    max_length: int | None = changed(trl.RewardConfig, "max_length", 2048, "App C: context of 2k tokens")
    gradient_checkpointing: bool = changed(trl.RewardConfig, "gradient_checkpointing", False, _CHECKPOINTING)
    bf16: bool | None = changed(trl.RewardConfig, "bf16", None, _PRECISION)
    report_to: str | list[str] | None = changed(trl.RewardConfig, "report_to", "none", "ours")
    save_total_limit: int | None = changed(trl.RewardConfig, "save_total_limit", 1, _DISK)

    def __post_init__(self) -> None:
        _check(self, "reward")
        _before_upstream(self)
        super().__post_init__()


def _check(config: Any, stage: str) -> None:
    """Raise one InstructGPTError with every rule that the settings of `config` break."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    problems = Problems(f"{type(config).__name__}: these settings cannot be used:")
    broken: set[str] = set()
    refused = refused_by_ppo_config() if stage == "ppo" else {}
    for item in fields(config):
        value = values[item.name]
        if item.name in refused and value not in (default_of(item), *CHANGE_NOTHING.get(item.name, ())):
            broken.add(item.name)
            problems.add(f"{item.name} = {value!r}: {refused[item.name]}")
            continue
        choices = item.metadata.get("choices") if "source" in item.metadata else None
        rule = range_violation(item.name, value)
        if rule is None and choices and value is not None and value not in choices:
            rule = f"must be one of {', '.join(choices)}"
        if rule is not None:
            broken.add(item.name)
            problems.add(f"{item.name} = {value!r}: {rule}")
    if stage == "ppo" and values["num_generations"] != 1:
        problems.add(f"num_generations = {values['num_generations']!r}: must be 1, the baseline is the value model")
    for violation in violations(stage, {key: value for key, value in values.items() if key not in broken}):
        problems.add(f"{violation.key} = {values[violation.key]!r}: {violation.rule}")
    problems.raise_if_any()


def _before_upstream(config: Any) -> None:
    """Settle what TRL and transformers would settle without regard to the device, or with a deprecation warning."""
    if config.bf16 is None:
        precision = "fp16" if config.fp16 else native_precision(config.use_cpu)
        config.bf16, config.fp16 = precision == "bf16", precision == "fp16"
    # transformers 5.2x renames these two; the old names, which TRL uses, still decide.
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if hasattr(config, new) and getattr(config, new) is None:
            setattr(config, new, getattr(config, old))
    # `min_lr_rate` belongs to the default scheduler, and every other one refuses it.
    if config.lr_scheduler_kwargs == _COSINE_TO_TENTH and config.lr_scheduler_type != "cosine_with_min_lr":
        config.lr_scheduler_kwargs = None
