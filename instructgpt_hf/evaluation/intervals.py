"""95 % intervals for measurements over prompts or questions.

Those of the bootstrap are percentile intervals over independent units (prompts, questions), from `resamples` samples
drawn with `seed`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from instructgpt_hf.errors import InstructGPTError

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

    def entries(self, name: str) -> dict[str, float]:
        """The three entries of a result or of stage.json: `name`, `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def wilson(successes: float, count: int) -> Estimate:
    """A share with Wilson's score interval, which lies inside [0, 1] and has a width even for 0 and 1.

    Args:
        successes: may be fractional. A tie as half a success varies less than the binomial distribution that the
            interval assumes, which makes the interval too wide rather than too narrow.
        count: number of independent trials.

    Raises:
        ValueError: if `count` is 0 or `successes` is outside [0, count].
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"Expected 0 <= successes <= count and count >= 1, got {successes} of {count}.")
    share, width = successes / count, _Z**2 / count
    center = (share + width / 2) / (1 + width)
    half = _Z * math.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    # At 0 and 1, rounding could put an end of the interval on the wrong side of the share.
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one value per unit, with its bootstrap interval.

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
    """A ratio of sums with its bootstrap interval, such as correct pairs / pairs with prompts as units.

    Args:
        numerators: [N], one number per unit.
        denominators: [N], each > 0.

    Raises:
        ValueError: if there are no units, the lengths differ, or a denominator is not positive.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.shape != bottom.shape or top.ndim != 1 or len(top) == 0 or (bottom <= 0).any():
        raise ValueError(
            f"Expected as many numerators as positive denominators, at least one, got {len(top)} and {len(bottom)}."
        )
    sums = resampled_sums(np.stack([top, bottom], axis=1), seed, resamples)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def bounded_ratio(
    numerators: np.ndarray, denominators: np.ndarray, lowest: float = 0.0, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """`bootstrap_ratio` of a quantity that lies between `lowest` and 1 in every unit.

    If all units agree (a perfect model, a single prompt), every resample is the same and the bootstrap interval has
    width 0; the interval is then that of `wilson_between`.

    Args:
        numerators: [N], one number per unit.
        denominators: [N], each >= 0; units with 0 are left out.
        lowest: 0 for shares, -1 for correlations and for differences of shares.

    Raises:
        ValueError: if no denominator is positive.
    """
    used = denominators > 0
    estimate = bootstrap_ratio(numerators[used], denominators[used], seed, resamples)
    if estimate.high - estimate.low > 1e-12:
        return estimate
    return wilson_between(estimate.value, int(used.sum()), lowest)


def wilson_between(value: float, units: int, lowest: float = 0.0) -> Estimate:
    """Wilson's interval for a mean over `units` independent units, each between `lowest` and 1.

    No quantity with these bounds varies more than a share of successes: the interval is rather too wide.
    """
    span = 1 - lowest
    share = min(1.0, max(0.0, (value - lowest) / span))
    _, low, high = wilson(share * units, units)
    return Estimate(value, lowest + span * low, lowest + span * high)


def resampled_sums(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """[R, C]: column sums of R = `resamples` bootstrap samples of the rows of `values` [N, C], one row per unit."""
    rng, units, sums = np.random.default_rng(seed), len(values), []
    block = max(1, _BLOCK // units)
    for start in range(0, resamples, block):
        samples = min(block, resamples - start)
        drawn = rng.integers(units, size=(samples, units)) + units * np.arange(samples)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=samples * units).reshape(samples, units)
        sums.append(counts.astype(float) @ values)
    return np.concatenate(sums)


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `first - second` over the same units, with its bootstrap interval.

    For two policies on the same questions, this interval is narrower than their separate intervals suggest.

    Raises:
        ValueError: if the lengths differ or there are no values.
    """
    if len(first) != len(second):
        raise ValueError(f"Expected the same units on both sides, got {len(first)} and {len(second)}.")
    return bootstrap_mean([float(a) - float(b) for a, b in zip(first, second, strict=True)], seed)


def win_rate(scores: Sequence[float], opponent_scores: Sequence[float]) -> dict[str, float]:
    """Share of prompts on which a policy's completion scores above its opponent's; a tie is half a win.

    Args:
        scores: one number per prompt, from a judge or a labeler.
        opponent_scores: of the opponent's completions of the same prompts.

    Returns:
        `win_rate` with Wilson's interval over prompts, and the counts `wins`, `ties`, `losses`, `prompts`.

    Raises:
        InstructGPTError: if there are no prompts or a score is NaN.
    """
    pairs = list(zip(scores, opponent_scores, strict=True))
    wins, ties, losses = (sum(test(a, b) for a, b in pairs) for test in (operator.gt, operator.eq, operator.lt))
    if wins + ties + losses < len(pairs) or not pairs:
        raise InstructGPTError(f"win rate: {len(pairs)} prompts, some with a score that is not a number.")
    share = wilson(wins + 0.5 * ties, len(pairs))
    return {**share.entries("win_rate"), "wins": wins, "ties": ties, "losses": losses, "prompts": len(pairs)}
