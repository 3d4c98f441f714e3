"""Measures of a reward model on scored rankings, each with the same measure of length as a baseline.

Intervals are 95 % bootstrap intervals over prompts, because the pairs of one prompt are not independent. The interval
of `x` is in `x_low` and `x_high`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.intervals import RESAMPLES, Estimate, bounded_ratio, resampled_sums, wilson_between
from instructgpt_hf.evaluation.reward_model.pairs import Rankings

# Bins of equal width: of the confidence over [0.5, 1], and of the score difference.
_CONFIDENCE_BINS, _HISTOGRAM_BINS = 10, 24


def accuracy(table: Rankings) -> dict[str, Any]:
    """Share of strict pairs whose better completion has the higher score; equal scores count one half.

    Returns:
        `accuracy`, `pairs`, `prompts` (with at least one strict pair), `tied_pairs`, `equal_scores` (strict pairs with
        equal scores); with lengths `length_baseline_accuracy`, the accuracy of "the longer one is better", and
        `above_length_baseline`, the difference of the two.
    """
    strict = table.strict
    result = _accuracy_of(table, strict)
    result["tied_pairs"] = int((~strict).sum())
    result["equal_scores"] = int((strict & (table.differences(table.scores) == 0)).sum())
    if table.lengths is not None:
        above = table.points(table.scores) - table.points(table.lengths)
        result |= table.pair_mean(above, strict, -1.0).entries("above_length_baseline")
    return result


def breakdown(table: Rankings) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by the number of completions and by the difference of dense ranks.

    Dense ranks number the distinct ranks of a prompt: 1, 2, 2, 5 become 1, 2, 2, 3, in which the first and the last
    differ by 2.

    Returns:
        `by_completions` and `by_gap`: for every K and every difference in the data, in increasing order, a dict with
        `completions` or `gap`, `accuracy`, `pairs`, `prompts` and with lengths `length_baseline_accuracy`.
    """
    keys = {"completions": table.sizes[table.prompt], "gap": table.gap}
    return {
        f"by_{name}": [
            {name: int(value), **_accuracy_of(table, table.strict & (key == value))}
            for value in np.unique(key[table.strict])
        ]
        for name, key in keys.items()
    }


def _accuracy_of(table: Rankings, chosen: np.ndarray) -> dict[str, Any]:
    result: dict[str, Any] = table.pair_mean(table.points(table.scores), chosen).entries("accuracy")
    result |= {"pairs": int(chosen.sum()), "prompts": len(np.unique(table.prompt[chosen]))}
    if table.lengths is not None:
        result |= table.pair_mean(table.points(table.lengths), chosen).entries("length_baseline_accuracy")
    return result


def calibration(table: Rankings) -> dict[str, Any]:
    """Calibration of sigmoid(score difference), the probability of a pair's order that the loss fits.

    Every strict pair counts once, for the completion with the higher score: its confidence is
    sigmoid(|score difference|), in [0.5, 1], and it is a hit if that completion is the better one; equal scores are
    half a hit at confidence 0.5. Counting each pair for both completions would add the mirrored curve.

    Returns:
        `ece`: the mean over pairs of |accuracy - mean confidence| of the pair's bin. It is never negative and biased
        upwards on few pairs. Its interval is therefore from the value minus the 95 % quantile of the distance between
        resampled and measured curve (at least 0) to the 97.5 % quantile of the resampled values.
        `ece_by_chance`: the mean of that distance: about the ece of a calibrated model on as many pairs.
        `overconfidence`: mean confidence minus accuracy, over all strict pairs; above 0 the scores are too far apart.
        `bins`: dicts with `low` and `high` (edges; a confidence on an edge belongs to the upper bin), `pairs`,
        `confidence` (mean) and `accuracy`; no empty bins.
    """
    strict, hits = table.strict, table.points(table.scores)
    confidence = 1 / (1 + np.exp(-np.abs(table.differences(table.scores))))
    place = np.minimum(((confidence - 0.5) * 2 * _CONFIDENCE_BINS).astype(int), _CONFIDENCE_BINS - 1)
    excess, counts = (confidence - hits) * strict, table.sums(strict)
    by_bin = np.stack([table.sums(excess * (place == number)) for number in range(_CONFIDENCE_BINS)], axis=1)
    used = counts > 0
    sums = resampled_sums(np.column_stack([by_bin, counts])[used], table.seed, table.resamples)
    measured, resampled = by_bin.sum(0) / counts.sum(), sums[:, :-1] / sums[:, -1:]
    value, noise = float(np.abs(measured).sum()), np.abs(resampled - measured).sum(1)
    high = max(value, float(np.quantile(np.abs(resampled).sum(1), 0.975)))
    ece = Estimate(value, max(0.0, value - float(np.quantile(noise, 0.95))), high)
    if high - ece.low <= 1e-12:
        ece = wilson_between(value, int(used.sum()))
    bins = []
    for number in np.unique(place[strict]).tolist():
        chosen = strict & (place == number)
        edges = {"low": 0.5 + number / (2 * _CONFIDENCE_BINS), "high": 0.5 + (number + 1) / (2 * _CONFIDENCE_BINS)}
        inside = {"pairs": int(chosen.sum()), "confidence": float(confidence[chosen].mean())}
        bins.append({**edges, **inside, **table.pair_mean(hits, chosen).entries("accuracy")})
    return {
        **ece.entries("ece"),
        "ece_by_chance": float(noise.mean()),
        **table.pair_mean(excess, strict, -1.0).entries("overconfidence"),
        "bins": bins,
    }


def kendall_tau(table: Rankings) -> dict[str, Any]:
    """Kendall's tau-b between scores and ranks, one per prompt, averaged over prompts.

    tau-b is (right pairs - wrong pairs) / sqrt(strict pairs x pairs of unequal scores), and 0 for a prompt with equal
    scores only. Prompts whose completions all tie are left out.

    Returns:
        `kendall_tau`, `prompts`; with lengths `length_baseline_kendall_tau`, the same with lengths as scores.
    """
    strict = table.sums(table.strict)

    def mean_tau(values: np.ndarray) -> Estimate:
        sign = np.sign(table.differences(values))
        tau = table.sums(sign * table.strict) / np.sqrt(np.maximum(strict * table.sums(sign != 0), 1))
        return table.prompt_mean(tau, strict > 0)

    result: dict[str, Any] = {**mean_tau(table.scores).entries("kendall_tau"), "prompts": int((strict > 0).sum())}
    if table.lengths is not None:
        result |= mean_tau(table.lengths).entries("length_baseline_kendall_tau")
    return result


def score_gaps(table: Rankings) -> dict[str, list[Any]]:
    """Histograms of |score difference| over the strict pairs ordered right and over those ordered wrong.

    Returns:
        `edges` [B + 1], `right` [B] and `wrong` [B] (equal scores are in neither). The last edge is the 99.5 %
        quantile; larger differences count in the last bin.
    """
    gaps = table.differences(table.scores)[table.strict]
    last = float(np.quantile(np.abs(gaps), 0.995)) or 1.0
    edges = np.linspace(0, last, _HISTOGRAM_BINS + 1)
    right, wrong = (np.histogram(np.minimum(sizes, last), edges)[0] for sizes in (gaps[gaps > 0], -gaps[gaps < 0]))
    return {"edges": edges.tolist(), "right": right.tolist(), "wrong": wrong.tolist()}


def agreement(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    prompts: Sequence[Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any] | None:
    """Share of pairs ordered alike by two labelers, of the pairs that both ranked strictly.

    Args:
        first: [R][k], one labeler's ranks of some completions of a prompt; 1 is best.
        second: [R][k], another labeler's ranks of the same completions.
        prompts: [R], the prompt of each row (any hashable), the units of the bootstrap; by default each row has its
            own.

    Returns:
        `agreement`, `pairs`, `tied_pairs` (tied by at least one of the two) and `prompts` (with a pair); None
        if no pair is ranked strictly by both.

    Raises:
        InstructGPTError: if the rows differ in shape.
    """
    names = list(range(len(first))) if prompts is None else list(prompts)
    if not len(first) == len(second) == len(names) or any(
        len(a) != len(b) for a, b in zip(first, second, strict=True)
    ):
        raise InstructGPTError("labeler agreement: expected two ranks of every completion, one from each labeler.")
    alike: Counter[Any] = Counter()
    strict: Counter[Any] = Counter()
    tied = 0
    for a, b, name in zip(first, second, names, strict=True):
        for i, j in itertools.combinations(range(len(a)), 2):
            product = (a[i] - a[j]) * (b[i] - b[j])
            if product == 0:
                tied += 1
            else:
                strict[name] += 1
                alike[name] += product > 0
    if not strict:
        return None
    shares = bounded_ratio(np.array([*alike.values()]), np.array([*strict.values()]), 0.0, seed, resamples)
    return {**shares.entries("agreement"), "pairs": strict.total(), "tied_pairs": tied, "prompts": len(strict)}
