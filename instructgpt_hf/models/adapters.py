"""The adapters of a PEFT model by their role, and how to apply one of them; training stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from peft import PeftModel

from instructgpt_hf._compat.peft import (
    REFERENCE_ADAPTER,
    AdapterLayer,
    adapter_layers,
    applied_adapters,
    apply_adapters,
)

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]

POLICY_ADAPTER = "default"
# Adapter names that cannot collide with module names.
VALUE_ADAPTER = "value_model"
# Further reward models on the same base are numbered: reward_model_2, ...
REWARD_ADAPTER = "reward_model"


def adapter_of(name: str) -> str:
    """Name of the adapter that a parameter of a PEFT model belongs to; the policy's for the base's parameters."""
    parts = name.split(".")
    if VALUE_ADAPTER in parts:
        return VALUE_ADAPTER
    frozen = (part for part in parts if part == REFERENCE_ADAPTER or part.startswith(REWARD_ADAPTER))
    return next(frozen, POLICY_ADAPTER)


@contextlib.contextmanager
def using_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Apply one adapter of a PEFT model, or none, inside the block.

    Args:
        model: PEFT model with LoRA adapters.
        name: the adapter's name; None applies the base alone.

    Raises:
        ValueError: if the model has no adapter of that name.
    """
    if name is not None and name not in model.peft_config:
        raise ValueError(f"No adapter {name!r}; the model has {', '.join(map(repr, model.peft_config))}.")
    with _applied(adapter_layers(model), [] if name is None else [name]):
        yield


def recompute_with_same_adapter(model: PeftModel) -> Callable[[], Contexts]:
    """`context_fn` of activation checkpointing that recomputes a block under the adapter of its forward pass.

    Without it, the recomputation applies the adapter that is active during the backward pass, and gradients are wrong
    without an error.
    """

    def contexts() -> Contexts:
        layers = adapter_layers(model)
        names = applied_adapters(layers)
        return contextlib.nullcontext(), _applied(layers, names)

    return contexts


@contextlib.contextmanager
def _applied(layers: list[AdapterLayer], names: list[str]) -> Iterator[None]:
    before = applied_adapters(layers)
    apply_adapters(layers, names)
    try:
        yield
    finally:
        apply_adapters(layers, before)
