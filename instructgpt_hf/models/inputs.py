"""Padded batches of token ids, the arguments of their forward passes, and evaluation mode for measurements."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from instructgpt_hf._compat.peft import unwrap_peft

Row = TypeVar("Row", bound=Sequence[int])
Result = TypeVar("Result")

_watcher: ContextVar[Callable[[int, int], Any] | None] = ContextVar("_watcher", default=None)


@contextlib.contextmanager
def watch_batches(watcher: Callable[[int, int], Any]) -> Iterator[None]:
    """Inside the block, `map_by_length` calls `watcher(rows done, rows in all)` before each batch and at its end."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def map_by_length(
    function: Callable[[list[Row]], Iterable[Result]],
    rows: Sequence[Row],
    batch_size: int,
    longest_first: bool = True,
) -> list[Result]:
    """Apply a function to batches of rows of token ids, those of similar length together.

    Args:
        function: returns one result per row of its batch.
        rows: N lists of token ids.
        batch_size: rows per batch.
        longest_first: order of the batches; the N results are in the order of `rows`.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=longest_first)
    results: dict[int, Result] = {}
    watcher = _watcher.get() or (lambda done, total: None)
    for start in range(0, len(order), batch_size):
        watcher(start, len(order))
        batch = order[start : start + batch_size]
        results.update(zip(batch, function([rows[row] for row in batch]), strict=True))
    watcher(len(order), len(order))
    return [results[row] for row in range(len(rows))]


def padded(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] of B rows padded to the longest, and their attention mask."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return padded_ids.to(device), mask.to(device)


@contextlib.contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Put models into evaluation mode inside, and every module back into its mode after; skip plain callables."""
    modules = [module for model in models if isinstance(model, torch.nn.Module) for module in model.modules()]
    modes = {module: module.training for module in modules}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def model_device(model: object) -> torch.device:
    """Device of a model's inputs; the CPU for a plain callable without a `device`."""
    return torch.device(getattr(model, "device", "cpu"))


def model_inputs(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward pass over ids and mask [B, S], padded on either side, with positions where it takes them.

    The model is a causal model or classifier, whole, PEFT or on a shared base.
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
