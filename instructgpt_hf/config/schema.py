"""What the YAML file of each stage may hold: the fields of its three dataclasses. The functions import TRL."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from instructgpt_hf.config.fields import default_of

REQUIRED = {"sft": ("model_name_or_path", "dataset_name"), "reward": ("dataset_name",), "ppo": ("dataset_name",)}

_SCHEDULE = "is fixed: constant after warmup_iterations (C.4)"
_PUSHED = "has no effect; finished stages are pushed as a whole: push_to_hub, or `instructgpt-hf push`"
_EVALUATED = "has no effect; the policies are evaluated when they are trained"
_WHOLE = "would sample from another distribution than the log-probabilities are taken from; remove it"
_REFERENCE = "has no effect; the KL reference is the SFT model (§3.5)"
_SFT_START = "cannot be set: the policy starts from the SFT stage; set sft_model_path"
_ONE = "is always 1, because the baseline of PPO is the value model; remove it"
# Fields of the upstream dataclasses that a recipe cannot set, with what to do instead.
_RESERVED = {
    "config": "is an option of the command, not a setting",
    "hub_token": "is a secret and does not belong in a recipe; log in with `hf auth login`",
    "chat_template_path": "has no effect; set prompt_template in sft.yaml",
    "eos_token": "has no effect; the tokenizer's EOS ends every completion",
    "hub_always_push": _PUSHED,
    "hub_model_id": _PUSHED,
    "hub_revision": _PUSHED,
    "hub_strategy": _PUSHED,
    "ignore_data_skip": "would break resuming",
    "lora_task_type": "is set by the stage",
    "model_init_kwargs": "has no effect; set dtype, attn_implementation or load_in_4bit",
    "output_dir": "comes from the command: --output_dir",
    "pad_token": "has no effect; a padding token that differs from EOS is chosen or added",
    "parallelism_config": "is not a plain value; use accelerate's configuration file",
    "save_only_model": "would break resuming",
}
_RESERVED_SFT = {
    "assistant_only_loss": "has no effect; the loss covers the completion",
    "completion_only_loss": "has no effect; the loss always covers the completion only",
    "dataset_kwargs": "has no effect; the dataset is prepared before TRL sees it",
    "dataset_num_proc": "has no effect; the dataset is prepared before TRL sees it",
    "dataset_text_field": "has no effect; demonstrations have the columns prompt and completion",
}
_RESERVED_REWARD = {
    "average_tokens_across_devices": "would make the mean over prompts wrong on several processes",
    "center_rewards_coefficient": "has no effect; see center_on_demonstrations",
    "dataset_num_proc": "has no effect; the dataset is prepared before TRL sees it",
    "pad_to_multiple_of": "has no effect",
}
_RESERVED_PPO = {
    "data_seed": "has no effect; the order of the prompts follows seed",
    "label_smoothing_factor": "has no effect; the losses are those of PPO and of next tokens",
    "neftune_noise_alpha": "would add noise to the log-probabilities; remove it",
    "chat_template_kwargs": "has no effect; the SFT stage's prompt format is used",
    "eval_strategy": _EVALUATED,
    "eval_steps": _EVALUATED,
    "eval_on_start": _EVALUATED,
    "log_multimodal": "has no effect; prompts are text",
    "mask_truncated_completions": "has no effect; see missing_eos_penalty and missing_eos_score",
    "min_p": _WHOLE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "repetition_penalty": _WHOLE,
    "router_aux_loss_coef": "has no effect",
    "sync_ref_model": _REFERENCE,
    "top_k": _WHOLE,
    "top_p": _WHOLE,
    "lr_scheduler_kwargs": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "model_name_or_path": _SFT_START,
    "model_revision": _SFT_START,
    "normalize_advantages": "belongs to RLOO; set whiten_advantages",
    "num_generations": _ONE,
    "num_generations_eval": _ONE,
    "num_train_epochs": "does not set the length of PPO; set total_episodes or max_steps",
    "steps_per_generation": "follows from the batch sizes; set generation_batch_size",
    "warmup_steps": "is counted in iterations; set warmup_iterations",
}


# Wider than the upstream annotation, as the Trainer's own `train` takes it.
_HINTS: dict[str, Any] = {"resume_from_checkpoint": bool | str | None}


# What a program may set that trains with `PPOTrainer` itself.
_RESERVED_IN_RECIPES = {
    *("eval_strategy", "eval_steps", "eval_on_start"),
    *("num_generations", "num_generations_eval", "steps_per_generation"),
}


class Setting(NamedTuple):
    """One key of a stage's YAML file.

    Attributes:
        name: the key.
        owner: name of the dataclass that has the field.
        hint: its type annotation.
        default: its default.
        help: what it does.
        source: where the default comes from, for the fields this package adds or changes; None for all others.
        choices: the values allowed, empty if they are not a short list.
    """

    name: str
    owner: str
    hint: Any
    default: Any
    help: str
    source: str | None
    choices: tuple[str, ...]


def refused_by_ppo_config() -> dict[str, str]:
    """Fields that `PPOConfig` itself refuses to have changed: key -> rule."""
    return {key: rule for key, rule in _RESERVED_PPO.items() if key not in _RESERVED_IN_RECIPES}


def reserved(stage: str) -> dict[str, str]:
    """Fields of the stage's dataclasses that a recipe cannot set: key -> rule."""
    return {**_RESERVED, **{"sft": _RESERVED_SFT, "reward": _RESERVED_REWARD, "ppo": _RESERVED_PPO}[stage]}


def stage_classes(stage: str) -> tuple[type, type, type]:
    """The dataclasses of a stage: where data come from, the model, the training."""
    from instructgpt_hf.config import data, model, ppo
    from instructgpt_hf.config import training as stages

    arguments, training = {
        "sft": (data.SFTArguments, stages.SFTConfig),
        "reward": (data.RewardArguments, stages.RewardConfig),
        "ppo": (data.PPOArguments, ppo.PPOConfig),
    }[stage]
    return arguments, model.ModelConfig, training


@cache
def stage_settings(stage: str) -> Mapping[str, Setting]:
    """Every key that `<stage>.yaml` may hold, in the order data, model, training."""
    found: dict[str, Setting] = {}
    forbidden = reserved(stage)
    for owner in stage_classes(stage):
        hints = typing.get_type_hints(owner)
        for item in fields(owner):
            if not item.init or item.name in forbidden:
                continue
            found[item.name] = Setting(
                name=item.name,
                owner=owner.__name__,
                hint=_HINTS.get(item.name, hints[item.name]),
                default=default_of(item),
                help=item.metadata.get("help", ""),
                source=item.metadata.get("source"),
                choices=tuple(item.metadata.get("choices") or ()),
            )
    return MappingProxyType(found)
