"""95 % intervals for measurements over prompts or questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
# 97.5 % point of the normal distribution.
_Z = 1.959963984540054
# Bounds the memory of one block of resampled indices (8 bytes each).
_BLOCK = 4_000_000


class Estimate(NamedTuple):
    """A measured value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, count: int) -> Estimate:
    """A share with Wilson's score interval, which stays inside [0, 1] and is not empty at either end.

    Args:
        successes: may be fractional: half a success for a tie varies less than the binomial the interval assumes, so
            the interval then errs on the wide side.
        count: number of independent trials.

    Raises:
        ValueError: if `count` is 0 or `successes` is outside [0, count].
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"Expected 0 <= successes <= count and count >= 1, got {successes} of {count}.")
    share, width = successes / count, _Z**2 / count
    center = (share + width / 2) / (1 + width)
    half = _Z * math.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    # At the ends of the range rounding may step over the share itself.
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A mean with its percentile bootstrap interval.

    Args:
        values: one number per independent unit (prompt, question).
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: if there are no values.
    """
    return bootstrap_ratio(values, np.ones(len(values)), seed, resamples)


def bootstrap_ratio(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A ratio of sums with its percentile bootstrap interval over units, such as correct pairs over pairs by prompt.

    Args:
        numerators: one number per independent unit.
        denominators: as many, each > 0.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: if there are no units, the lengths differ, or a denominator is not positive.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.shape != bottom.shape or top.ndim != 1 or len(top) == 0 or (bottom <= 0).any():
        raise ValueError(
            f"Expected as many numerators as positive denominators, at least one, got {len(top)} and {len(bottom)}."
        )
    rng = np.random.default_rng(seed)
    ratios: list[float] = []
    block = max(1, _BLOCK // len(top))
    while len(ratios) < resamples:
        drawn = rng.integers(len(top), size=(min(block, resamples - len(ratios)), len(top)))
        ratios.extend(top[drawn].sum(1) / bottom[drawn].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of `first - second` over the same units, with its bootstrap interval.

    Two policies that answer the same questions are compared with more certainty than their separate intervals suggest.

    Raises:
        ValueError: if the lengths differ or there are no values.
    """
    if len(first) != len(second):
        raise ValueError(f"Expected the same units on both sides, got {len(first)} and {len(second)}.")
    return bootstrap_mean([float(a) - float(b) for a, b in zip(first, second, strict=True)], seed, resamples)
