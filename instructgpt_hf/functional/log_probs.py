"""Log-probability and entropy of tokens from logits, without a second [B, T, V] tensor in float32.

At a 49k vocabulary the logits are the largest tensor of a training step. `log_softmax` of their float32 copy would
hold three of that size; here blocks of rows are widened one after another, and the backward pass recomputes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# 64 MiB in float32: large enough that the loop's overhead vanishes, small beside any [B, T, V] tensor.
_BLOCK_ELEMENTS = 1 << 24


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under the distribution it was sampled from.

    Rollouts sampled at a temperature have the log-probabilities of the tempered distribution; using it for the policy,
    the reference and the update alike keeps the first ratio at 1.

    Args:
        logits: [B, T, V], any floating dtype; `logits[:, t]` predicts `ids[:, t]` (already shifted).
        ids: [B, T], each in [0, V), padding included.
        temperature: > 0, divides the logits.

    Returns:
        Float32 [B, T] (float64 for float64 logits), differentiable once with respect to the logits. A token that gets
        no gradient gives none, even where its logits are not finite.

    Raises:
        ValueError: if the shapes do not fit or the temperature is not positive.
    """
    _check(logits, temperature)
    if ids.shape != logits.shape[:2]:
        raise ValueError(f"Expected ids [B, T] for logits [B, T, V], got {list(ids.shape)} and {list(logits.shape)}.")
    result: Tensor = _TokenLogProbs.apply(logits, ids, temperature)
    return result


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of each token's distribution.

    Args:
        logits: [B, T, V], any floating dtype.
        temperature: > 0, divides the logits.

    Returns:
        Float32 [B, T] (float64 for float64 logits). Logits of minus infinity count as probability 0.

    Raises:
        ValueError: if `logits` has not three dimensions or the temperature is not positive.
    """
    _check(logits, temperature)
    rows = []
    for block in _blocks(logits):
        wide = _widen(logits[block], temperature)
        log_total = wide.logsumexp(-1)
        probabilities = torch.exp(wide - log_total[..., None])
        rows.append(log_total - (probabilities * wide.masked_fill(probabilities == 0, 0.0)).sum(-1))
    return torch.cat([row.flatten() for row in rows]).view(logits.shape[:2])


class _TokenLogProbs(torch.autograd.Function):
    """`logits[ids] - logsumexp(logits)` that saves the logits as they came and recomputes the softmax by blocks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        chosen = _widen(logits.gather(-1, ids[..., None]).squeeze(-1), temperature)
        log_total = torch.empty_like(chosen)
        for block in _blocks(logits):
            log_total[block] = _widen(logits[block], temperature).logsumexp(-1)
        ctx.save_for_backward(logits, ids, log_total)
        ctx.temperature = temperature
        return chosen - log_total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, log_total = ctx.saved_tensors
        scaled = gradient / ctx.temperature
        result = torch.empty_like(logits)
        for block in _blocks(logits):
            part = scaled[block][..., None]
            wide = torch.exp(_widen(logits[block], ctx.temperature) - log_total[block][..., None]).mul_(-part)
            wide.scatter_add_(-1, ids[block][..., None], part)
            result[block] = wide.masked_fill_(part == 0, 0.0)
        return result, None, None


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Indices that cut [B, T] into blocks, in row-major order; slices, so that no block is a copy."""
    batch, length, vocabulary = logits.shape
    rows = max(1, _BLOCK_ELEMENTS // max(1, length * vocabulary))
    steps = max(1, length if rows > 1 else min(length, _BLOCK_ELEMENTS // vocabulary))
    for row in range(0, batch, rows):
        for step in range(0, length, steps):
            yield slice(row, row + rows), slice(step, step + steps)


def _widen(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def _check(logits: Tensor, temperature: float) -> None:
    if logits.ndim != 3:
        raise ValueError(f"Expected logits [B, T, V], got {list(logits.shape)}.")
    if not temperature > 0:
        raise ValueError(f"Expected a temperature > 0, got {temperature}.")
