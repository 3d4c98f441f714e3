"""What the YAML file of each stage may hold: the fields of its three dataclasses. The functions import TRL."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from instructgpt_hf.config.rules import default_of

REQUIRED = {"sft": ("model_name_or_path", "dataset_name"), "reward": ("dataset_name",), "ppo": ("dataset_name",)}

_SCHEDULE = "is fixed: constant after warmup_iterations (C.4)"
_SFT_START = "cannot be set: the policy starts from the SFT stage; set sft_model_path"
_ONE = "is always 1, because the baseline of PPO is the value model; remove it"
# Fields of the upstream dataclasses that a recipe cannot set, with what to do instead.
_RESERVED = {
    "config": "is an option of the command, not a setting",
    "hub_token": "is a secret and does not belong in a recipe; log in with `hf auth login`",
    "lora_task_type": "is set by the stage",
    "output_dir": "comes from the command: --output_dir",
    "parallelism_config": "is not a plain value; use accelerate's configuration file",
}
_RESERVED_PPO = {
    "lr_scheduler_kwargs": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "model_name_or_path": _SFT_START,
    "model_revision": _SFT_START,
    "normalize_advantages": "belongs to RLOO; set whiten_advantages",
    "num_generations": _ONE,
    "num_generations_eval": _ONE,
    "num_train_epochs": "does not set the length of PPO; set total_episodes or max_steps",
    "reward_weights": "has no meaning with one reward model; remove it",
    "steps_per_generation": "follows from the batch sizes; set generation_batch_size",
    "warmup_steps": "is counted in iterations; set warmup_iterations",
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


def reserved(stage: str) -> dict[str, str]:
    """Fields of the stage's dataclasses that a recipe cannot set: key -> rule."""
    return {**_RESERVED, **(_RESERVED_PPO if stage == "ppo" else {})}


def stage_classes(stage: str) -> tuple[type, type, type]:
    """The dataclasses of a stage: where data come from, the model, the training."""
    from instructgpt_hf.config import data, model, stages

    arguments, training = {
        "sft": (data.SFTArguments, stages.SFTConfig),
        "reward": (data.RewardArguments, stages.RewardConfig),
        "ppo": (data.PPOArguments, stages.PPOConfig),
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
                hint=hints[item.name],
                default=default_of(item),
                help=item.metadata.get("help", ""),
                source=item.metadata.get("source"),
                choices=tuple(item.metadata.get("choices") or ()),
            )
    return MappingProxyType(found)
