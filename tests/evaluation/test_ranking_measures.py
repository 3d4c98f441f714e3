"""Measures of a reward model against hand-computed values and against loops over the pairs of every prompt."""

import json
import math
import random
import tracemalloc
from statistics import mean

import numpy as np
import pytest

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation import (
    AccuracyBreakdown,
    Calibration,
    KendallTau,
    LabelerAgreement,
    LengthBias,
    PairwiseAccuracy,
    evaluate_rankings,
    flat_metrics,
    labeler_agreement,
)
from instructgpt_hf.evaluation.reward_model.measures import calibration
from instructgpt_hf.evaluation.reward_model.pairs import Rankings

# Two prompts. First: a > b = c by rank, scores order a, b right and a, c wrong. Second: d > e, equal scores.
SCORES = [[1.0, 0.0, 2.0], [0.5, 0.5]]
RANKS = [[1, 4, 4], [1, 2]]
LENGTHS = [[9, 5, 9], [3, 7]]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    # evaluate makes a folder for every metric even when nothing is written to it.
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


def rankings(seed, prompts=40):
    rng = random.Random(seed)
    ranks = [[rng.choice([1, 2, 3, 7]) for _ in range(rng.randint(2, 7))] for _ in range(prompts)]
    scores = [[round(rng.gauss(-rank / 2, 1.5), 1) for rank in row] for row in ranks]
    lengths = [[rng.randint(1, 12) for _ in row] for row in ranks]
    return scores, ranks, lengths


def strict_pairs(scores, ranks, lengths):
    """Every strict pair by a double loop: prompt, K, dense rank gap, score and length of the better and the worse."""
    for prompt, (row, order, tokens) in enumerate(zip(scores, ranks, lengths, strict=True)):
        levels = sorted(set(order))
        for i in range(len(row)):
            for j in range(len(row)):
                if order[i] < order[j]:
                    gap = levels.index(order[j]) - levels.index(order[i])
                    yield prompt, len(row), gap, (row[i], row[j]), (tokens[i], tokens[j])


def point(better, worse):
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def ordinary_ranks(values):
    """Average ranks, by counting."""
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def pearson(x, y):
    """None if one does not vary."""
    dx, dy = [a - mean(x) for a in x], [b - mean(y) for b in y]
    norm = math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / norm if norm else None


def tau_b(values, ranks):
    """From all ordered pairs: the sum of products of signs over the root of the product of the sums of squares."""

    def sign(x):
        return (x > 0) - (x < 0)

    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks))]
    a = [sign(values[i] - values[j]) for i, j in pairs]
    b = [sign(ranks[j] - ranks[i]) for i, j in pairs]
    norm = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_by_completions_and_gap_equal_the_loop(seed):
    data = rankings(seed)
    result = evaluate_rankings(*data)
    pairs = list(strict_pairs(*data))
    for table, key, place in (("by_completions", "completions", 1), ("by_gap", "gap", 2)):
        assert [row[key] for row in result[table]] == sorted({pair[place] for pair in pairs})
        for row in result[table]:
            chosen = [pair for pair in pairs if pair[place] == row[key]]
            assert row["pairs"] == len(chosen)
            assert row["prompts"] == len({pair[0] for pair in chosen})
            assert row["accuracy"] == pytest.approx(mean(point(*pair[3]) for pair in chosen))
            assert row["length_baseline_accuracy"] == pytest.approx(mean(point(*pair[4]) for pair in chosen))
            assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert sum(row["pairs"] for row in result["by_gap"]) == result["accuracy"]["pairs"] == len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_equals_the_loop(seed):
    data = rankings(seed)
    result = evaluate_rankings(*data)["calibration"]
    bins = {}
    for *_, (better, worse), _ in strict_pairs(*data):
        confidence = 1 / (1 + math.exp(-abs(better - worse)))
        place = min(9, int((confidence - 0.5) / 0.05 + 1e-12))
        bins.setdefault(place, []).append((confidence, point(better, worse)))
    total = sum(map(len, bins.values()))
    assert [row["pairs"] for row in result["bins"]] == [len(bins[place]) for place in sorted(bins)]
    for row, place in zip(result["bins"], sorted(bins), strict=True):
        assert row["low"] == pytest.approx(0.5 + 0.05 * place)
        assert row["confidence"] == pytest.approx(mean(a for a, _ in bins[place]))
        assert row["accuracy"] == pytest.approx(mean(b for _, b in bins[place]))
        assert row["low"] <= row["confidence"] <= row["high"]
    ece = sum(len(rows) / total * abs(mean(a - b for a, b in rows)) for rows in bins.values())
    assert result["ece"] == pytest.approx(ece)
    assert result["ece_low"] <= ece <= result["ece_high"]
    assert result["overconfidence"] == pytest.approx(sum(a - b for rows in bins.values() for a, b in rows) / total)


@pytest.mark.parametrize("seed", range(3))
def test_kendall_tau_equals_the_loop(seed):
    scores, ranks, lengths = rankings(seed)
    result = evaluate_rankings(scores, ranks, lengths)["kendall_tau"]
    used = [place for place, row in enumerate(ranks) if len(set(row)) > 1]
    assert result["prompts"] == len(used)
    for name, values in (("kendall_tau", scores), ("length_baseline_kendall_tau", lengths)):
        assert result[name] == pytest.approx(mean(tau_b(values[place], ranks[place]) for place in used))
        assert result[f"{name}_low"] < result[name] < result[f"{name}_high"]


@pytest.mark.parametrize("seed", range(3))
def test_length_bias_equals_the_loop(seed):
    scores, ranks, lengths = rankings(seed)
    result = evaluate_rankings(scores, ranks, lengths)["length"]
    by_score, by_rank = [], []
    for row, order, tokens in zip(scores, ranks, lengths, strict=True):
        with_score = pearson(ordinary_ranks(tokens), ordinary_ranks(row))
        with_rank = pearson(ordinary_ranks(tokens), ordinary_ranks([-rank for rank in order]))
        if with_score is not None and with_rank is not None:
            by_score.append(with_score)
            by_rank.append(with_rank)
    assert result["prompts"] == len(by_score)
    assert result["score_length_correlation"] == pytest.approx(mean(by_score))
    assert result["rank_length_correlation"] == pytest.approx(mean(by_rank))
    unequal = [pair for pair in strict_pairs(scores, ranks, lengths) if pair[4][0] != pair[4][1]]
    labels = [float(tokens[0] > tokens[1]) for *_, tokens in unequal]
    model = [point(*pair) if tokens[0] > tokens[1] else point(*pair[::-1]) for *_, pair, tokens in unequal]
    assert result["pairs"] == len(unequal)
    assert result["longer_ranks_higher"] == pytest.approx(mean(labels))
    assert result["longer_scores_higher"] == pytest.approx(mean(model))
    bins = result["by_length_difference"]
    for row in bins:
        inside = [abs(tokens[0] - tokens[1]) for *_, tokens in unequal]
        inside = [place for place, size in enumerate(inside) if row["low"] <= size <= row["high"]]
        assert row["pairs"] == len(inside)
        assert row["longer_scores_higher"] == pytest.approx(mean(model[place] for place in inside))
    assert sum(row["pairs"] for row in bins) == len(unequal)


def test_everything_by_hand():
    result = evaluate_rankings(SCORES, RANKS, LENGTHS)
    accuracy = result["accuracy"]
    # a-b right, a-c wrong, d-e equal: 1.5 of 3. By length a-b right, a-c equal, d-e wrong: 1.5 of 3.
    assert (accuracy["accuracy"], accuracy["length_baseline_accuracy"], accuracy["above_length_baseline"]) == (
        0.5,
        0.5,
        0,
    )
    assert [accuracy[name] for name in ("pairs", "tied_pairs", "equal_scores", "prompts")] == [3, 1, 1, 2]
    assert [(row["completions"], row["accuracy"], row["pairs"]) for row in result["by_completions"]] == [
        (2, 0.5, 1),
        (3, 0.5, 2),
    ]
    # Ranks 1, 4, 4 are neighbours: nothing lies between.
    assert [(row["gap"], row["pairs"]) for row in result["by_gap"]] == [(1, 3)]
    # Differences 1, -1 and 0: confidences 0.731 with one hit of two, and 0.5 with half a hit.
    sigmoid = 1 / (1 + math.exp(-1))
    assert result["calibration"]["ece"] == pytest.approx(2 / 3 * (sigmoid - 0.5))
    assert result["calibration"]["overconfidence"] == pytest.approx(2 / 3 * (sigmoid - 0.5))
    assert [(row["pairs"], row["accuracy"]) for row in result["calibration"]["bins"]] == [(1, 0.5), (2, 0.5)]
    # First prompt: (1 - 1) / sqrt(2 x 3); second: scores all equal.
    assert result["kendall_tau"]["kendall_tau"] == 0
    # Lengths: first (1 - 0) / sqrt(2 x 2), second -1.
    assert result["kendall_tau"]["length_baseline_kendall_tau"] == pytest.approx((0.5 - 1) / 2)
    # The second prompt's scores do not vary. Centred ranks of the first: score 0, -1, 1; length 1/2, -1, 1/2; rank
    # 1, -1/2, -1/2.
    length = result["length"]
    assert length["prompts"] == 1
    assert length["score_length_correlation"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert length["rank_length_correlation"] == pytest.approx(0.75 / 1.5)
    # Unequal lengths: a-b, where the longer is better and scores higher; d-e, where it is worse and scores equal.
    assert (length["pairs"], length["longer_ranks_higher"], length["longer_scores_higher"]) == (2, 0.5, 0.75)
    assert sum(result["score_gaps"]["right"]) == sum(result["score_gaps"]["wrong"]) == 1


def test_dense_ranks_count_the_levels_between():
    result = evaluate_rankings([[4.0, 3.0, 2.0, 1.0]], [[1, 2, 2, 9]], [[1, 1, 1, 1]])
    assert [(row["gap"], row["pairs"]) for row in result["by_gap"]] == [(1, 4), (2, 1)]


def test_metrics_are_the_entries_of_the_whole_result():
    scores, ranks, lengths = rankings(7)
    result = evaluate_rankings(scores, ranks, lengths)
    given = {"predictions": scores, "references": ranks, "lengths": lengths}
    assert PairwiseAccuracy().compute(**given) == result["accuracy"]
    assert AccuracyBreakdown().compute(**given) == {key: result[key] for key in ("by_completions", "by_gap")}
    assert Calibration().compute(**given) == result["calibration"]
    assert KendallTau().compute(**given) == result["kendall_tau"]
    assert LengthBias().compute(**given) == result["length"]
    with pytest.raises(InstructGPTError, match="pass the completions' lengths"):
        LengthBias().compute(predictions=scores, references=ranks)


def test_intervals_of_the_calibration_cover_the_truth():
    """Gumbel noise on the scores makes sigmoid(score difference) the true probability of every pair."""
    rng = np.random.default_rng(0)
    zero_ece = zero_overconfidence = 0
    for trial in range(100):
        scores = rng.normal(size=(40, 4)) * 1.2
        ranks = ((-(scores + rng.gumbel(size=scores.shape))).argsort(1).argsort(1) + 1).tolist()
        result = calibration(Rankings.read("test", scores.tolist(), ranks, seed=trial, resamples=200))
        zero_ece += result["ece_low"] == 0
        zero_overconfidence += result["overconfidence_low"] < 0 < result["overconfidence_high"]
        if trial < 10:
            sharper = calibration(Rankings.read("test", (4 * scores).tolist(), ranks, seed=trial, resamples=200))
            assert sharper["ece_low"] > 0 and sharper["overconfidence_low"] > 0
    assert zero_ece >= 88
    assert zero_overconfidence >= 88


def test_order_and_shift_of_the_scores_change_nothing():
    scores, ranks, lengths = rankings(3)
    first = evaluate_rankings(scores, ranks, lengths)
    turned = evaluate_rankings(*([row[::-1] for row in column] for column in (scores, ranks, lengths)))
    shifted = evaluate_rankings([[score + 8 for score in row] for row in scores], ranks, lengths)
    flat, *others = (flat_metrics(result) for result in (first, turned, shifted))
    for other in others:
        assert other == pytest.approx(flat)


def test_the_result_is_json_and_flat_metrics_have_their_names():
    result = evaluate_rankings(*rankings(1))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    flat = flat_metrics(result)
    assert all(type(value) in (int, float) for value in flat.values())
    kept = (
        "eval_accuracy eval_pairs eval_prompts length_baseline_accuracy above_length_baseline tied_pairs equal_scores"
    )
    new = "eval_ece eval_ece_by_chance eval_overconfidence eval_kendall_tau length_baseline_kendall_tau"
    new += " score_length_correlation rank_length_correlation longer_scores_higher longer_ranks_higher"
    bases = {name.removesuffix("_low").removesuffix("_high") for name in flat}
    strata = {f"eval_accuracy_k{row['completions']}" for row in result["by_completions"]}
    strata |= {f"eval_accuracy_gap{row['gap']}" for row in result["by_gap"]}
    assert bases == {*kept.split(), *new.split(), *strata}
    assert flat["eval_accuracy_low"] == result["accuracy"]["accuracy_low"]
    assert flat["eval_accuracy_gap2"] == result["by_gap"][1]["accuracy"]


@pytest.mark.parametrize(
    "scores, ranks, lengths",
    [
        ([[1.0, 0.0]], [[1, 2]], [[3, 3]]),
        ([[0.0, 0.0, 0.0]] * 3, [[1, 2, 2]] * 3, [[5, 4, 3]] * 3),
        ([[1e30, -1e30], [1.0, 0.0]], [[1, 2], [1, 1]], [[2, 1], [4, 4]]),
    ],
    ids=["one pair", "equal scores", "far apart"],
)
def test_degenerate_rankings_have_finite_results(scores, ranks, lengths):
    result = evaluate_rankings(scores, ranks, lengths)
    json.dumps(result, allow_nan=False)
    flat = flat_metrics(result)
    for name in flat:
        if name + "_low" in flat:
            assert flat[name + "_low"] <= flat[name] <= flat[name + "_high"], name
    assert flat["eval_accuracy_low"] < flat["eval_accuracy_high"]


def test_memory_grows_with_the_pairs_and_not_with_all_completions_squared():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5000, 9)).tolist()
    tracemalloc.start()
    table = Rankings.read("test", scores, [list(range(1, 10))] * 5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table.prompt) == 5000 * 36
    assert peak < 60e6  # one bool for every two completions would take 2 GB


@pytest.mark.parametrize(
    "scores, ranks, lengths, message",
    [
        ([[1.0, float("inf")]], [[1, 2]], [[1, 1]], "row 0 of scores holds a value that is not a finite number"),
        ([[1.0, 2.0]], [[1, 2]], [[1]], "row 0 has 1 lengths for 2 ranks"),
        ([[1.0, 2.0]], [[1, 1]], [[1, 1]], "none of 1 prompts has two completions of different rank"),
        ([], [], [], "there are no rankings"),
    ],
)
def test_bad_rankings_are_named(scores, ranks, lengths, message):
    with pytest.raises(InstructGPTError, match=f"evaluation of the reward model: {message}"):
        evaluate_rankings(scores, ranks, lengths)


def row(prompt, labeler, **ranks):
    return {"prompt": prompt, "completions": list(ranks), "ranks": list(ranks.values()), "labeler": labeler}


def test_labelers_agree_by_hand():
    rows = [
        row("p", "anna", a=1, b=2, c=3),
        row("p", "bert", c=2, a=1, b=3),  # ab alike, ac alike, bc not
        row("p", "cleo", a=1, b=1, d=2),  # with anna and with bert: ab tied
        row("q", "anna", x=1, y=2),
        row("q", "bert", x=2, y=1),  # not alike
        row("q", "anna", x=1, y=2),  # with bert not alike; anna with herself does not count
        row("r", "bert", x=1, y=2),
    ]
    result = labeler_agreement(rows)
    assert result["agreement"] == pytest.approx(2 / 5)
    assert [result[name] for name in ("pairs", "tied_pairs", "prompts", "labelers")] == [5, 2, 2, 3]
    assert 0 <= result["agreement_low"] < 0.4 < result["agreement_high"] <= 1


def test_labeler_agreement_equals_the_loop():
    rng = random.Random(0)
    first, second = ([[rng.randint(1, 4) for _ in range(5)] for _ in range(30)] for _ in range(2))
    alike = pairs = tied = 0
    for a, b in zip(first, second, strict=True):
        for i in range(5):
            for j in range(i):
                if a[i] == a[j] or b[i] == b[j]:
                    tied += 1
                else:
                    pairs += 1
                    alike += (a[i] < a[j]) == (b[i] < b[j])
    result = LabelerAgreement().compute(predictions=first, references=second)
    assert result["agreement"] == pytest.approx(alike / pairs)
    assert (result["pairs"], result["tied_pairs"]) == (pairs, tied)
    assert result["agreement_low"] < result["agreement"] < result["agreement_high"]
    flat = flat_metrics({**evaluate_rankings(SCORES, RANKS, LENGTHS), "labelers": result})
    assert (flat["labeler_agreement"], flat["labeler_agreement_low"]) == (result["agreement"], result["agreement_low"])


def test_without_labelers_or_shared_pairs_there_is_no_agreement():
    assert labeler_agreement([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}]) is None
    assert labeler_agreement([row("p", "anna", a=1, b=2), row("p", "bert", a=1, c=2)]) is None
    assert labeler_agreement([row("p", "anna", a=1, b=1), row("p", "bert", a=1, b=2)]) is None
    with pytest.raises(InstructGPTError, match="no pair of completions is ranked strictly by two labelers"):
        LabelerAgreement().compute(predictions=[[1, 1]], references=[[1, 2]])
    with pytest.raises(InstructGPTError, match="expected two ranks of every completion"):
        LabelerAgreement().compute(predictions=[[1, 2]], references=[[1, 2, 3]])
