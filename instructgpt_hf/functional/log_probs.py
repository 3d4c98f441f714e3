"""Log-probability and entropy of tokens from logits, without a second [B, T, V] tensor in float32.

At a 49k vocabulary the logits are the largest tensor of a training step. `log_softmax` of their float32 copy would
hold three of that size; here blocks of rows are widened one after another, and the backward pass recomputes them.

TRL's `ChunkedLogProbFunction` holds no logits, but takes 1.4 times as long on a CPU (benchmarks/log_probs.py; not
measured on a GPU) and cannot exclude ids from the distribution, as PPO does.
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
        temperature: divides the logits; ValueError unless above 0.

    Returns:
        Float32 [B, T] (float64 for float64 logits), differentiable once with respect to the logits. A token that gets
        no gradient gives none, even where its logits are not finite.
    """
    return _checked(logits, ids, temperature, with_entropy=False)[0]


def log_probs_and_entropy(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_log_probs`, and the entropy [B, T] in nats of the distribution that each token was drawn from.

    Both come from one exponential of the logits. The entropy carries no gradient; a logit of minus infinity counts as
    probability 0.
    """
    return _checked(logits, ids, temperature, with_entropy=True)


def _checked(logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    if logits.ndim != 3:
        raise ValueError(f"Expected logits [B, T, V], got {list(logits.shape)}.")
    if ids.shape != logits.shape[:2]:
        raise ValueError(f"Expected ids [B, T] for logits [B, T, V], got {list(ids.shape)} and {list(logits.shape)}.")
    if not temperature > 0:
        raise ValueError(f"Expected a temperature > 0, got {temperature}.")
    return _TokenLogProbs.apply(logits, ids, temperature, with_entropy)


class _TokenLogProbs(torch.autograd.Function):
    """`logits[ids] - logsumexp(logits)` that saves the logits as they came and recomputes the softmax by blocks."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        chosen = _widen(logits.gather(-1, ids[..., None]).squeeze(-1), temperature)
        log_total, entropy = torch.empty_like(chosen), torch.empty_like(chosen)
        for block in _blocks(logits):
            wide = _widen(logits[block], temperature)
            if with_entropy:
                log_total[block], entropy[block] = _log_total_and_entropy(wide)
            else:
                log_total[block] = wide.logsumexp(-1)
        ctx.save_for_backward(logits, ids, log_total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _entropy: Any) -> tuple[Tensor, None, None, None]:
        logits, ids, log_total = ctx.saved_tensors
        scaled = gradient / ctx.temperature
        result = torch.empty_like(logits)
        for block in _blocks(logits):
            part = scaled[block][..., None]
            view = result[block]
            wide = view if view.dtype == log_total.dtype else torch.empty_like(view, dtype=log_total.dtype)
            torch.sub(_widen(logits[block], ctx.temperature), log_total[block][..., None], out=wide)
            wide.exp_().mul_(-part).scatter_add_(-1, ids[block][..., None], part).masked_fill_(part == 0, 0.0)
            if wide is not view:
                view.copy_(wide)
        return result, None, None, None


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Indices that cut [B, T] into blocks, in row-major order; slices, so that no block is a copy."""
    batch, length, vocabulary = logits.shape
    rows = max(1, _BLOCK_ELEMENTS // max(1, length * vocabulary))
    steps = max(1, length if rows > 1 else min(length, _BLOCK_ELEMENTS // vocabulary))
    for row in range(0, batch, rows):
        for step in range(0, length, steps):
            yield slice(row, row + rows), slice(step, step + steps)


def _log_total_and_entropy(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy over the last dimension; entropy = log total - mean of the logits."""
    largest = wide.amax(-1, keepdim=True)
    weights = torch.exp(wide - largest)
    total = weights.sum(-1)
    log_total = largest.squeeze(-1) + total.log()
    # The sum of products, without a tensor of the products.
    mean = torch.einsum("btv,btv->bt", weights, wide) / total
    if not bool(mean.isfinite().all()):
        # 0 times minus infinity is not a number; 0 times the smallest number is 0.
        mean = torch.einsum("btv,btv->bt", weights, wide.clamp(min=torch.finfo(wide.dtype).min)) / total
    return log_total, log_total - mean


def _widen(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature
