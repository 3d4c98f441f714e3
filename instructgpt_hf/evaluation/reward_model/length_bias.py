"""Dependence of a reward model's scores on length, compared with that of the labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.intervals import RESAMPLES, bounded_ratio
from instructgpt_hf.evaluation.reward_model.pairs import Rankings

# Number of bins of the curve by length difference, with about equally many pairs each.
_BINS = 6


def length_bias(table: Rankings, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Dependence of the scores on length, compared with that of the labels.

    Args:
        table: the rankings, with lengths.
        seed: of the bootstrap.
        resamples: how many.

    Returns:
        `score_length_correlation` and `rank_length_correlation`: Spearman's correlation of length with the score and
        with the negative rank, one per prompt, averaged over the prompts in which all three vary; None without such a
        prompt.
        `longer_scores_higher` and `longer_ranks_higher`: share of the strict pairs of unequal length whose longer
        completion has the higher score (equal scores one half) or the better rank; None without such a pair.
        `pairs`: number of these pairs; `prompts`: number of prompts in the correlations.
        `by_length_difference`: the same two shares in bins of about equally many pairs by the difference in tokens,
        whose smallest, largest and mean value are `low`, `high` and `mean`.

    Raises:
        InstructGPTError: if the rankings have no lengths.
    """
    if table.lengths is None:
        raise InstructGPTError("length bias: pass the completions' lengths in tokens as `lengths`.")
    difference = table.differences(table.lengths)
    chosen = table.strict & (difference != 0)
    ends = np.unique(np.quantile(np.abs(difference[chosen]), np.linspace(0, 1, _BINS + 1)) if chosen.any() else [])
    result = {**_length_correlations(table, seed, resamples), **_longer_wins(table, chosen, seed, resamples)}
    result["by_length_difference"] = []
    for number, low in enumerate(ends[:-1] if len(ends) > 1 else ends):
        last = number + 2 >= len(ends)
        inside = chosen & (np.abs(difference) >= low) & (np.abs(difference) < (np.inf if last else ends[number + 1]))
        if inside.any():
            spread = np.abs(difference[inside])
            entry = {"low": int(spread.min()), "high": int(spread.max()), "mean": float(spread.mean())}
            result["by_length_difference"].append({**entry, **_longer_wins(table, inside, seed, resamples)})
    return result


def _longer_wins(table: Rankings, chosen: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    assert table.lengths is not None
    if not chosen.any():
        return {"longer_scores_higher": None, "longer_ranks_higher": None, "pairs": 0}
    longer_is_better = table.points(table.lengths)
    right = table.points(table.scores)
    shares = {
        "longer_scores_higher": np.where(longer_is_better == 1, right, 1 - right),
        "longer_ranks_higher": longer_is_better,
    }
    counts = table.sums(chosen)
    result: dict[str, Any] = {}
    for name, points in shares.items():
        result |= bounded_ratio(table.sums(points * chosen), counts, 0.0, seed, resamples).entries(name)
    return {**result, "pairs": int(chosen.sum())}


def _length_correlations(table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
    assert table.lengths is not None
    owner = np.repeat(np.arange(len(table.sizes)), table.sizes)

    def per_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values, len(table.sizes))

    ranked = np.bincount(table.better, table.strict, len(owner)) - np.bincount(table.worse, table.strict, len(owner))
    lengths, scores = table.standings(table.lengths), table.standings(table.scores)
    norms = [np.sqrt(per_prompt(values**2)) for values in (lengths, scores, ranked)]
    varied = np.minimum.reduce(norms) > 0
    if not varied.any():
        return {"score_length_correlation": None, "rank_length_correlation": None, "prompts": 0}
    result: dict[str, Any] = {"prompts": int(varied.sum())}
    for name, values, norm in (("score", scores, norms[1]), ("rank", ranked, norms[2])):
        correlation = per_prompt(lengths * values) / np.where(varied, norms[0] * norm, 1)
        estimate = bounded_ratio(correlation * varied, varied.astype(float), -1.0, seed, resamples)
        result |= estimate.entries(f"{name}_length_correlation")
    return result
