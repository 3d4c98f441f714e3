"""Checks that contenders compute the same thing, before any of them is timed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from common.memory import BenchmarkError

Gradients = dict[str, torch.Tensor]


def relative(reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Norm of the difference over the norm of the reference, all tensors as one vector.

    Where the reference is 0, the norm of the difference.
    """
    norm = distance = 0.0
    for expected, actual in zip(reference, other, strict=True):
        norm += expected.double().square().sum().item()
        distance += (actual.double() - expected.double()).square().sum().item()
    return math.sqrt(distance / norm) if norm > 0 else math.sqrt(distance)


def require_same_parameters(reference: Gradients, other: Gradients) -> None:
    """Raise unless both sides have gradients of the same parameters."""
    if reference.keys() != other.keys() or not reference:
        names = sorted(reference.keys() ^ other.keys())
        raise BenchmarkError(f"the contenders train different parameters: {names[:6]}")


def gradient_difference(reference: Gradients, other: Gradients) -> float:
    """Relative difference of two gradients, all parameters as one vector.

    Raises:
        BenchmarkError: if they belong to different parameters.
    """
    require_same_parameters(reference, other)
    return relative(reference.values(), (other[name] for name in reference))


def require_equal(differences: dict[str, float], bound: float) -> None:
    """Raise if a relative difference is above the bound, or not a number."""
    wrong = [f"{name} {value:.1e}" for name, value in differences.items() if not value <= bound]
    if wrong:
        raise BenchmarkError(
            f"the contenders do not compute the same thing; relative differences above {bound:.0e}: {', '.join(wrong)}"
        )
