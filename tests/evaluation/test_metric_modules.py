"""The evaluate.Metric modules against loops over pairs."""

import random

import evaluate
import pytest

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation import PairwiseAccuracy, WinRate


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    # evaluate makes a folder for every metric even when nothing is written to it.
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


def rankings(seed, prompts=30):
    rng = random.Random(seed)
    sizes = [rng.randint(2, 9) for _ in range(prompts)]
    ranks = [[rng.randint(1, 4) for _ in range(size)] for size in sizes]
    scores = [[round(rng.gauss(-rank, 1.0), 1) for rank in row] for row in ranks]
    lengths = [[rng.randint(1, 20) for _ in row] for row in ranks]
    return scores, ranks, lengths


def by_loop(scores, ranks):
    correct = pairs = tied = equal = 0
    for row, order in zip(scores, ranks, strict=True):
        for i in range(len(row)):
            for j in range(i):
                if order[i] == order[j]:
                    tied += 1
                    continue
                better, worse = (i, j) if order[i] < order[j] else (j, i)
                pairs += 1
                equal += row[better] == row[worse]
                correct += 1.0 if row[better] > row[worse] else 0.5 if row[better] == row[worse] else 0.0
    return correct / pairs, pairs, tied, equal


@pytest.mark.parametrize("seed", range(3))
def test_pairwise_accuracy_equals_the_loop(seed):
    scores, ranks, lengths = rankings(seed)
    result = PairwiseAccuracy().compute(predictions=scores, references=ranks, lengths=lengths)
    accuracy, pairs, tied, equal = by_loop(scores, ranks)
    assert result["accuracy"] == pytest.approx(accuracy)
    assert (result["pairs"], result["tied_pairs"], result["equal_scores"]) == (pairs, tied, equal)
    assert result["accuracy_low"] < accuracy < result["accuracy_high"]
    baseline = by_loop(lengths, ranks)[0]
    assert result["length_baseline_accuracy"] == pytest.approx(baseline)
    assert result["length_baseline_accuracy_low"] < baseline < result["length_baseline_accuracy_high"]
    assert result["above_length_baseline"] == pytest.approx(accuracy - baseline)


def test_pairwise_accuracy_by_hand():
    # Strict pairs: (a, b) right, (a, c) wrong; (d, e) has equal scores; (b, c) and the last prompt tie.
    result = PairwiseAccuracy().compute(
        predictions=[[2.0, 1.0, 3.0], [0.5, 0.5], [1.0, 2.0]], references=[[1, 2, 2], [1, 2], [1, 1]]
    )
    assert result["accuracy"] == 0.5
    assert (result["pairs"], result["tied_pairs"], result["equal_scores"], result["prompts"]) == (3, 2, 1, 2)
    assert "length_baseline_accuracy" not in result


def test_a_perfect_model_still_has_an_interval():
    result = PairwiseAccuracy().compute(predictions=[[1.0, 0.0]] * 10, references=[[1, 2]] * 10)
    assert result["accuracy"] == result["accuracy_high"] == 1.0
    assert 0.6 < result["accuracy_low"] < 0.8


def test_batches_may_be_added_one_by_one():
    scores, ranks, _ = rankings(4)
    metric = PairwiseAccuracy()
    for row, order in zip(scores, ranks, strict=True):
        metric.add(prediction=row, reference=order)
    assert metric.compute() == PairwiseAccuracy().compute(predictions=scores, references=ranks)


def test_the_interval_depends_on_the_seed_alone():
    scores, ranks, _ = rankings(5)
    first, again, other = (
        PairwiseAccuracy().compute(predictions=scores, references=ranks, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first["accuracy"] == other["accuracy"]


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(predictions=[[1.0, 2.0]], references=[[1, 1]]),
            "none of 1 prompts has two completions of different rank",
        ),
        (dict(predictions=[[1.0]], references=[[1, 2]]), "row 0 has 1 scores for 2 ranks"),
        (dict(predictions=[[1.0, 2.0]], references=[[1, 2]], lengths=[[1]]), "row 0 has 1 lengths for 2 ranks"),
        (dict(predictions=[[1.0, 2.0]], references=[[1, 2]], lengths=[]), "0 lengths for 1 rankings"),
        (dict(predictions=[[1.0, float("nan")]], references=[[1, 2]]), "row 0 of scores holds a value"),
    ],
)
def test_bad_rankings_are_named(given, message):
    with pytest.raises(InstructGPTError, match=message):
        PairwiseAccuracy().compute(**given)


def test_win_rate():
    result = WinRate().compute(predictions=[1.0, 2.0, 3.0, 0.0], references=[0.0, 2.0, 1.0, 1.0])
    assert (result["wins"], result["ties"], result["losses"], result["prompts"]) == (2, 1, 1, 4)
    assert result["win_rate"] == 2.5 / 4
    assert 0 < result["win_rate_low"] < 2.5 / 4 < result["win_rate_high"] < 1


def test_swapping_the_sides_mirrors_the_win_rate():
    rng = random.Random(0)
    first, second = ([rng.randint(0, 5) for _ in range(50)] for _ in range(2))
    there = WinRate().compute(predictions=first, references=second)
    back = WinRate().compute(predictions=second, references=first)
    assert there["win_rate"] == pytest.approx(1 - back["win_rate"])
    assert there["win_rate_low"] == pytest.approx(1 - back["win_rate_high"])


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(InstructGPTError, match="2 prompts, some with a score that is not a number"):
        WinRate().compute(predictions=[1.0, float("nan")], references=[0.0, 0.0])


@pytest.mark.parametrize("metric", [PairwiseAccuracy, WinRate])
def test_they_are_metrics_that_combine(metric):
    assert issubclass(metric, evaluate.Metric)
    assert set(metric().features) == {"predictions", "references"}
    assert metric().description
