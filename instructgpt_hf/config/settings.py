"""Queries over the settings of each stage, which its three dataclasses declare. The functions import TRL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from instructgpt_hf.config.fields import Setting, known_upstream, settings_of

REQUIRED = {"sft": ("model_name_or_path", "dataset_name"), "reward": ("dataset_name",), "ppo": ("dataset_name",)}


def stage_classes(stage: str) -> tuple[type, type, type]:
    """The dataclasses of a stage: data, model, training."""
    from instructgpt_hf.config import data, model, ppo, training

    return {
        "sft": (data.SFTArguments, model.ModelConfig, training.SFTConfig),
        "reward": (data.RewardArguments, model.ModelConfig, training.RewardConfig),
        "ppo": (data.PPOArguments, model.ModelConfig, ppo.PPOConfig),
    }[stage]


@cache
def stage_settings(stage: str) -> Mapping[str, Setting]:
    """Every key that `<stage>.yaml` may hold, in the order data, model, training."""
    every = {key: item for owner in stage_classes(stage) for key, item in settings_of(owner).items()}
    return MappingProxyType({key: item for key, item in every.items() if key not in refusals(stage)})


@cache
def refusals(stage: str) -> Mapping[str, str]:
    """Keys that a recipe may not set, with the reason and what to do instead."""
    known = {key: about for owner in stage_classes(stage) for key, about in known_upstream(owner).items()}
    return MappingProxyType({key: about.refusal.rule for key, about in known.items() if about.refusal})


def neutral_keys(stage: str) -> frozenset[str]:
    """Settings that change only what is logged, saved or published; all others are part of the fingerprint."""
    return frozenset(key for key, item in stage_settings(stage).items() if item.neutral)


def adjustable_keys(stage: str) -> tuple[str, ...]:
    """Settings that may be changed when a stopped run continues from its checkpoint, sorted."""
    return tuple(sorted(key for key, item in stage_settings(stage).items() if item.adjustable))
