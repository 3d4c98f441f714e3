"""Statistics over the unmasked tokens of a padded batch.

Values are floating point of any shape, a mask is bool or 0/1 of the same shape. Values outside the mask are never
used: they may hold anything, NaN and infinity included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the unmasked values over dimension `dim`, by default over all; 0 where none is unmasked."""
    check_same_shape(values=values, mask=mask)
    mask = mask.bool()
    kept = torch.where(mask, values, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Variance of all unmasked values, a scalar; 0 for one value alone.

    `unbiased` divides by the count less one (Bessel) instead of the count.
    """
    check_same_shape(values=values, mask=mask)
    mask = mask.bool()
    # Junk is replaced before any arithmetic: multiplied by a zero gradient it would come back as NaN.
    squares = (torch.where(mask, values, 0.0) - masked_mean(values, mask)).square()
    count = mask.sum()
    return torch.where(mask, squares, 0.0).sum() / (count - int(unbiased)).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the unmasked values to variance 1 and, with `shift_mean`, move their mean to 0.

    The variance is the unbiased one, as in TRL 1.12's PPO and in lm-human-preferences; `eps` is added to it, so that
    equal values give 0 and not NaN. The result has the shape of `values` and is 0 outside the mask.
    """
    mean, scale = masked_mean(values, mask), torch.rsqrt(masked_var(values, mask, unbiased=True) + eps)
    whitened = (torch.where(mask.bool(), values, 0.0) - mean) * scale
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming every shape, unless all tensors have the same one (no silent broadcasting)."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected equal shapes, got {shapes}.")
