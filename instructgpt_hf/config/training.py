"""Training settings: what all stages share, and the configs of the SFT and the reward stage.

They are TRL's configs with the paper's defaults and the settings that TRL does not have. Every field that this package
adds or whose default it changes carries `metadata["source"]`: the section of the paper (Ouyang et al. 2022,
arXiv:2203.02155) that states the default, or "ours" where the paper states none.
"""

# ruff: noqa: RUF009  `changed` returns a dataclass field.
# mypy: disable-error-code="attr-defined, name-defined, has-type, misc"
# TRL exports its names lazily, which mypy does not see.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import trl
from transformers.trainer_utils import SchedulerType

from instructgpt_hf._compat.quirks import settle_checkpointing_names
from instructgpt_hf.config.device import native_precision
from instructgpt_hf.config.fields import Upstream, changed, not_in_recipes, refused, setting, settings_of
from instructgpt_hf.config.ranges import AT_LEAST_ONE, FRACTION, LIMIT, NOT_NEGATIVE, POSITIVE
from instructgpt_hf.config.rules import violations
from instructgpt_hf.errors import Problems

_Kwargs = dict[str, Any] | str | None
_TO_TENTH = {"min_lr_rate": 0.1}
_PUSHED = not_in_recipes("has no effect; finished stages are pushed as a whole: push_to_hub, or `instructgpt-hf push`")
_PREPARED = not_in_recipes("has no effect; the dataset is prepared before TRL sees it")
_NEUTRAL = Upstream(neutral=True)

_sft = partial(changed, trl.SFTConfig)  # TRL's three configs describe shared fields in the same words
_reward = partial(changed, trl.RewardConfig)


@dataclass
class StageConfig:
    """Settings and checks that the training configs of all stages share, in front of TRL's config of the stage.

    Raises:
        InstructGPTError: if settings are out of range or do not fit together; lists all problems.
    """

    stage: ClassVar[str]
    upstream: ClassVar[Mapping[str, Upstream]] = {
        **dict.fromkeys(("learning_rate", "num_train_epochs"), Upstream(POSITIVE)),
        **dict.fromkeys(("adam_epsilon", "max_grad_norm", "seed"), Upstream(NOT_NEGATIVE)),
        **dict.fromkeys(("warmup_steps", "weight_decay"), Upstream(NOT_NEGATIVE)),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), Upstream(FRACTION)),
        **dict.fromkeys(("per_device_eval_batch_size", "per_device_train_batch_size"), Upstream(AT_LEAST_ONE)),
        **dict.fromkeys(("gradient_accumulation_steps", "max_length"), Upstream(AT_LEAST_ONE)),
        "max_steps": Upstream(LIMIT),
        # Only logging, saving, publishing and speed: a finished stage stays valid when these change.
        "logging_steps": Upstream(POSITIVE, neutral=True),
        "save_steps": Upstream(POSITIVE, neutral=True),
        "save_total_limit": Upstream(AT_LEAST_ONE, neutral=True),
        "resume_from_checkpoint": Upstream(neutral=True, hint=bool | str | None),  # as `Trainer.train` takes it
        **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm"), _NEUTRAL),
        **dict.fromkeys(("project", "report_to", "run_name", "save_strategy"), _NEUTRAL),
        **dict.fromkeys(("hub_*", "logging_*", "push_to_hub*", "trackio_*"), _NEUTRAL),
        # What the commands decide, or what has no effect.
        **dict.fromkeys(("hub_always_push", "hub_model_id", "hub_revision", "hub_strategy"), _PUSHED),
        "chat_template_path": refused(
            "has no effect; set prompt_template in sft.yaml, or the trainer's prompt_format"
        ),
        "config": not_in_recipes("is an option of the command, not a setting"),
        "eos_token": refused("has no effect; the tokenizer's EOS ends every completion"),
        "hub_token": not_in_recipes("is a secret and does not belong in a recipe; log in with `hf auth login`"),
        "model_init_kwargs": not_in_recipes("has no effect; set dtype, attn_implementation or load_in_4bit"),
        "output_dir": not_in_recipes("comes from the command: --output_dir"),
        "pad_token": refused("has no effect; a padding token that differs from EOS is chosen or added"),
        "parallelism_config": not_in_recipes("is not a plain value; use accelerate's configuration file"),
        **dict.fromkeys(("ignore_data_skip", "save_only_model"), not_in_recipes("would break resuming")),
    }

    adam_beta2: float = _sft("adam_beta2", 0.95, "App C")
    gradient_checkpointing: bool = _sft("gradient_checkpointing", False, "ours: off; trades time for memory")
    bf16: bool | None = _sft(
        "bf16", None, "ours: bf16 where the device computes it natively, fp16 on older CUDA devices, else float32"
    )
    report_to: str | list[str] | None = _sft("report_to", "none", "ours")
    save_total_limit: int | None = _sft("save_total_limit", 1, "ours: the newest checkpoint is enough to resume")

    def __post_init__(self) -> None:
        self._check()
        self.settle()
        super().__post_init__()

    def _check(self) -> None:
        """Raise one InstructGPTError with every rule that the settings break."""
        owner: type = type(self)
        problems = Problems(f"{owner.__name__}: these settings cannot be used:")
        values: dict[str, Any] = {}
        for name, item in settings_of(owner).items():
            value, refusal = getattr(self, name), item.refusal
            if item.source is None:  # upstream checks the choices of its own fields
                item = item._replace(choices=())
            rule = item.violation(value)
            if refusal and refusal.in_programs and value not in (item.default, *refusal.off):
                rule = refusal.rule
            if rule is None:
                values[name] = value
            else:
                problems.add(f"{name} = {value!r}: {rule}")
        for violation in violations(self.stage, values):
            problems.add(f"{violation.key} = {values[violation.key]!r}: {violation.rule}")
        problems.raise_if_any()

    def settle(self) -> None:
        """Set what TRL and transformers would set without looking at the device, or with a deprecation warning."""
        if self.bf16 is None:
            precision = "fp16" if self.fp16 else native_precision(self.use_cpu)
            self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        settle_checkpointing_names(self)
        # `min_lr_rate` belongs to the default scheduler; every other one refuses it.
        if self.lr_scheduler_kwargs == _TO_TENTH and self.lr_scheduler_type != "cosine_with_min_lr":
            self.lr_scheduler_kwargs = None


@dataclass
class SFTConfig(StageConfig, trl.SFTConfig):
    """TRL's `SFTConfig` with the paper's supervised fine-tuning (C.1).

    The defaults are those of the paper's SFT models. The paper starts RL from another one (C.3): 2 epochs,
    `pretraining_mix: 0.1` and a learning rate of its own (5e-6 for 1.3B, 1.04e-5 for 6B).
    """

    stage: ClassVar[str] = "sft"
    upstream: ClassVar[Mapping[str, Upstream]] = {
        "assistant_only_loss": refused("has no effect; the loss covers the completion"),
        "completion_only_loss": refused("has no effect; the loss always covers the completion only", None),
        **dict.fromkeys(("dataset_kwargs", "dataset_num_proc"), _PREPARED),
        "dataset_text_field": refused("has no effect; demonstrations have the columns prompt and completion"),
    }

    # The paper's residual dropout is 0.2 for its SFT models (C.1); it states none for the RL initialisation.
    residual_dropout: float | None = setting(
        None,
        "Dropout of the residual branches; None keeps the model's.",
        "ours: many architectures have none",
        FRACTION,
    )
    pretraining_mix: float = setting(0.0, "Fraction of training examples that are pretraining text.", "C.1", FRACTION)
    learning_rate: float = _sft("learning_rate", 9.65e-6, "C.1: 1.3B and 6B; 5.03e-6 for 175B")
    num_train_epochs: float = _sft("num_train_epochs", 16, "C.1; 2 for the RL initialisation (C.3)")
    per_device_train_batch_size: int = _sft("per_device_train_batch_size", 8, "C.1: batch of 32")
    gradient_accumulation_steps: int = _sft("gradient_accumulation_steps", 4, "C.1: batch of 32")
    lr_scheduler_type: SchedulerType | str = _sft("lr_scheduler_type", "cosine_with_min_lr", "C.1")
    lr_scheduler_kwargs: _Kwargs = _sft("lr_scheduler_kwargs", _TO_TENTH, "C.1: cosine to 10 % of the peak")
    warmup_steps: float = _sft("warmup_steps", 0, "C.1: no warmup")
    max_length: int | None = _sft("max_length", 2048, "App C: context of 2k tokens")
    completion_only_loss: bool | None = _sft("completion_only_loss", True, "ours: the paper does not state it")


@dataclass
class RewardConfig(StageConfig, trl.RewardConfig):
    """TRL's `RewardConfig` with the paper's reward model (§3.5, C.2).

    `per_device_train_batch_size` counts prompts, each with all of its ranked completions. They are sorted by length
    and go through the model in as many passes of `max_tokens_per_forward` as they need; a ranking that exceeds one is
    computed in parts, at the price of another forward pass.
    """

    stage: ClassVar[str] = "reward"
    upstream: ClassVar[Mapping[str, Upstream]] = {
        "average_tokens_across_devices": not_in_recipes("would make the mean over prompts wrong on several processes"),
        "center_rewards_coefficient": not_in_recipes("has no effect; see center_on_demonstrations"),
        "dataset_num_proc": _PREPARED,
        "pad_to_multiple_of": not_in_recipes("has no effect"),
    }

    max_tokens_per_forward: int = setting(
        16_384, "Tokens of one forward and backward pass, padding included.", "ours: bounds memory", AT_LEAST_ONE
    )
    center_on_demonstrations: bool = setting(
        True, "Shift the scores after training so that demonstrations score 0 on average.", "§3.5"
    )
    center_num_demonstrations: int = setting(
        2_000,
        "Demonstrations that the scores are centred on, at most.",
        "ours: the standard error of their mean is far below one reward unit",
        AT_LEAST_ONE,
    )
    learning_rate: float = _reward("learning_rate", 9e-6, "C.2")
    num_train_epochs: float = _reward("num_train_epochs", 1, "C.2: more epochs overfit")
    per_device_train_batch_size: int = _reward("per_device_train_batch_size", 64, "C.2: batch of 64 prompts")
    lr_scheduler_type: SchedulerType | str = _reward("lr_scheduler_type", "cosine_with_min_lr", "C.2")
    lr_scheduler_kwargs: _Kwargs = _reward("lr_scheduler_kwargs", _TO_TENTH, "C.2: cosine to 10 % of the peak")
    max_length: int | None = _reward("max_length", 2048, "App C: context of 2k tokens")
