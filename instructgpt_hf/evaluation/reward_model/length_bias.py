"""Dependence of a reward model's scores on length, compared with that of the labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.reward_model.pairs import Rankings

# Number of bins of the curve by length difference, with about equally many pairs each.
_BINS = 6


def length_bias(table: Rankings) -> dict[str, Any]:
    """Dependence of the scores on length, compared with that of the labels.

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
    spread = np.abs(table.differences(table.lengths))
    chosen = table.strict & (spread > 0)
    bins = []
    ends = np.unique(np.quantile(spread[chosen], np.linspace(0, 1, _BINS + 1)) if chosen.any() else [])
    for number, low in enumerate(ends[:-1] if len(ends) > 1 else ends):
        high = ends[number + 1] if number + 2 < len(ends) else np.inf
        inside = chosen & (spread >= low) & (spread < high)
        if inside.any():
            sizes = spread[inside]
            entry = {"low": int(sizes.min()), "high": int(sizes.max()), "mean": float(sizes.mean())}
            bins.append({**entry, **_longer_wins(table, table.lengths, inside)})
    result = {**_correlations(table, table.lengths), **_longer_wins(table, table.lengths, chosen)}
    return {**result, "by_length_difference": bins}


def _longer_wins(table: Rankings, lengths: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    if not chosen.any():
        return {"longer_scores_higher": None, "longer_ranks_higher": None, "pairs": 0}
    longer_is_better, right = table.points(lengths), table.points(table.scores)
    longer_scores_higher = np.where(longer_is_better == 1, right, 1 - right)
    return {
        **table.pair_mean(longer_scores_higher, chosen).entries("longer_scores_higher"),
        **table.pair_mean(longer_is_better, chosen).entries("longer_ranks_higher"),
        "pairs": int(chosen.sum()),
    }


def _correlations(table: Rankings, lengths: np.ndarray) -> dict[str, Any]:
    """Spearman's correlations: cosines, within a prompt, of vectors of twice the centred average ranks."""
    owner = np.repeat(np.arange(len(table.sizes)), table.sizes)

    def per_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values, len(table.sizes))

    def standings(signs: np.ndarray) -> np.ndarray:
        """[M]: number of completions of the prompt below this one minus the number above it, from signs [Q]."""
        return np.bincount(table.better, signs, len(owner)) - np.bincount(table.worse, signs, len(owner))

    signs = np.sign(table.differences(lengths)), np.sign(table.differences(table.scores)), table.strict
    ranked = [standings(sign) for sign in signs]
    norms = [np.sqrt(per_prompt(values**2)) for values in ranked]
    varied = np.minimum.reduce(norms) > 0
    if not varied.any():
        return {"score_length_correlation": None, "rank_length_correlation": None, "prompts": 0}
    result: dict[str, Any] = {"prompts": int(varied.sum())}
    for name, values, norm in (("score", ranked[1], norms[1]), ("rank", ranked[2], norms[2])):
        correlation = per_prompt(ranked[0] * values) / np.where(varied, norms[0] * norm, 1)
        result |= table.prompt_mean(correlation, varied).entries(f"{name}_length_correlation")
    return result
