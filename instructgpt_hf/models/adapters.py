"""The adapters of a PEFT model by their role, and how to apply one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from peft import PeftModel

from instructgpt_hf._compat.peft import REFERENCE_ADAPTER, adapter_layers, applied_adapters, apply_adapters

POLICY_ADAPTER = "default"
# Adapter names that cannot collide with module names.
VALUE_ADAPTER = "value_model"
# Further reward models on the same base are numbered: reward_model_2, ...
REWARD_ADAPTER = "reward_model"


def adapter_of(name: str) -> str:
    """Name of the adapter that a parameter of a PEFT model belongs to; the policy's for the base's parameters."""
    known = (VALUE_ADAPTER, REFERENCE_ADAPTER)
    return next((part for part in name.split(".") if part in known or part.startswith(REWARD_ADAPTER)), POLICY_ADAPTER)


@contextlib.contextmanager
def using_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Apply one adapter of a PEFT model, or with None the base alone, inside the block.

    Raises:
        ValueError: if the model has no adapter of that name.
    """
    if name is not None and name not in model.peft_config:
        raise ValueError(f"No adapter {name!r}; the model has {', '.join(map(repr, model.peft_config))}.")
    with _applied(model, [] if name is None else [name]):
        yield


def recompute_with_same_adapter(model: PeftModel) -> Callable[[], tuple[AbstractContextManager[None], ...]]:
    """`context_fn` of activation checkpointing that recomputes a block under the adapter of its forward pass.

    Recomputation would else apply the adapter that is active during the backward pass, which gives wrong gradients
    without an error.
    """
    return lambda: (contextlib.nullcontext(), _applied(model, applied_adapters(adapter_layers(model))))


@contextlib.contextmanager
def _applied(model: PeftModel, names: list[str]) -> Iterator[None]:
    layers = adapter_layers(model)
    before = applied_adapters(layers)
    apply_adapters(layers, names)
    try:
        yield
    finally:
        apply_adapters(layers, before)
