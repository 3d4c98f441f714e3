"""The adapters of a PEFT model by their role, and which of them it applies.

PEFT's `set_adapter` switches off `requires_grad` of all other adapters, so with several trained adapters on one base a
switch between forward and backward silently loses gradients. Here only the layers' choice changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from instructgpt_hf._compat.peft import REFERENCE_ADAPTER, adapter_layers, applied_adapters, apply_adapters

POLICY_ADAPTER = "default"
# Names that are no part of a module's name in any model.
VALUE_ADAPTER = "value_model"
# Further reward models on the same base have a number behind it.
REWARD_ADAPTER = "reward_model"


def adapter_of(name: str) -> str:
    """The adapter that a parameter of a PEFT model belongs to, by its name; the policy's for all others."""
    parts = name.split(".")
    if VALUE_ADAPTER in parts:
        return VALUE_ADAPTER
    frozen = (part for part in parts if part == REFERENCE_ADAPTER or part.startswith(REWARD_ADAPTER))
    return next(frozen, POLICY_ADAPTER)


@contextlib.contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Apply one adapter of a PEFT model, or none, for the length of the block.

    Args:
        model: PEFT model with LoRA adapters.
        name: of the adapter; None leaves the base model alone.

    Raises:
        ValueError: if the model has no adapter of that name.
    """
    if name is not None and name not in model.peft_config:
        raise ValueError(f"No adapter {name!r}; the model has {', '.join(map(repr, model.peft_config))}.")
    with _applied(adapter_layers(model), [] if name is None else [name]):
        yield


def recompute_with_same_adapter(model: Any) -> Callable[[], tuple[Any, Any]]:
    """`context_fn` of activation checkpointing: recompute a block under the adapter that its forward pass applied.

    Without it the recomputation applies whatever adapter is active during the backward pass, and gradients come out
    wrong without an error.
    """

    def contexts() -> tuple[Any, Any]:
        layers = adapter_layers(model)
        names = applied_adapters(layers)
        return contextlib.nullcontext(), _applied(layers, names)

    return contexts


@contextlib.contextmanager
def _applied(layers: list[Any], names: list[str]) -> Iterator[None]:
    before = applied_adapters(layers)
    apply_adapters(layers, names)
    try:
        yield
    finally:
        apply_adapters(layers, before)
