"""Arguments of a forward pass over padded rows, and evaluation mode for measurements."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from instructgpt_hf._compat.peft import unwrap_peft


@contextlib.contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode inside, and every module back into its mode after; skip plain callables."""
    modules = [module for model in models if isinstance(model, torch.nn.Module) for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def model_device(model: Any) -> torch.device:
    """Device of a model's inputs; the CPU for a plain callable without a `device`."""
    return torch.device(getattr(model, "device", "cpu"))


def model_inputs(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward pass over padded rows, with explicit positions where the architecture takes them.

    Args:
        model: causal model or classifier, whole, PEFT or on a shared base.
        input_ids: [B, S].
        attention_mask: [B, S]; padding on either side.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if takes_positions(unwrap_peft(getattr(model, "host", model))):  # a scorer on a shared base has a `host`
        inputs["position_ids"] = position_ids(attention_mask)
    return inputs


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether a model without wrappers takes the position of every token as an argument."""
    return "position_ids" in inspect.signature(model.forward).parameters


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, S] that count tokens from 0, without padding, so that left padding does not shift them."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def last_token_index(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index [B] of the last 1 in each row of a mask [B, S]."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
