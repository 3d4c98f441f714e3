"""Statistics over the unmasked tokens of a padded batch.

Values outside the mask are never used: they may hold anything, NaN and infinity included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where nothing is.

    Args:
        values: floating point, any shape.
        mask: bool or 0/1, the same shape.
        dim: dimension to average over; all of them by default.

    Returns:
        A scalar, or `values` without dimension `dim`.

    Raises:
        ValueError: if the shapes differ.
    """
    check_same_shape(values=values, mask=mask)
    mask = mask.bool()
    kept = torch.where(mask, values, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Variance of all `values` where `mask` is true.

    Args:
        values: floating point, any shape.
        mask: bool or 0/1, the same shape.
        unbiased: divide by the count less one (Bessel) instead of the count. One value alone has variance 0.

    Returns:
        A scalar.

    Raises:
        ValueError: if the shapes differ.
    """
    check_same_shape(values=values, mask=mask)
    mask = mask.bool()
    # Junk is replaced before any arithmetic: multiplied by a zero gradient it would come back as NaN.
    squares = (torch.where(mask, values, 0.0) - masked_mean(values, mask)).square()
    count = mask.sum()
    return torch.where(mask, squares, 0.0).sum() / (count - int(unbiased)).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the unmasked values to variance 1 and, with `shift_mean`, move their mean to 0.

    The variance is the unbiased one, as in TRL 1.12's PPO and in lm-human-preferences.

    Args:
        values: floating point, any shape.
        mask: bool or 0/1, the same shape.
        shift_mean: False leaves the mean where it was and only scales the distance to it.
        eps: added to the variance, so that equal values give 0 and not NaN.

    Returns:
        A tensor of the shape of `values`, 0 where the mask is 0.

    Raises:
        ValueError: if the shapes differ.
    """
    mean = masked_mean(values, mask)
    whitened = (torch.where(mask.bool(), values, 0.0) - mean) * torch.rsqrt(
        masked_var(values, mask, unbiased=True) + eps
    )
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, 0.0)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming every shape, unless all tensors have the same one (no silent broadcasting)."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected equal shapes, got {shapes}.")
