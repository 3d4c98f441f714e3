"""Intervals: known values, coverage, and the reason for pairing."""

import numpy as np
import pytest

from instructgpt_hf.evaluation.intervals import (
    bootstrap_mean,
    bootstrap_ratio,
    bounded_ratio,
    paired_difference,
    resampled_sums,
    wilson,
)


def test_wilson_known_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263 and 15 of 148.
    assert [round(value, 4) for value in wilson(81, 263)[1:]] == [0.2553, 0.3662]
    assert [round(value, 4) for value in wilson(15, 148)[1:]] == [0.0624, 0.1605]
    assert [round(value, 4) for value in wilson(0, 20)] == [0.0, 0.0, 0.1611]
    assert wilson(20, 20).high == 1.0
    assert wilson(20, 20).low == pytest.approx(1 - wilson(0, 20).high)


@pytest.mark.parametrize("successes, count", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(successes, count):
    with pytest.raises(ValueError, match="0 <= successes <= count"):
        wilson(successes, count)


@pytest.mark.parametrize("share, ties", [(0.5, 0.0), (0.7, 0.3), (0.9, 0.1)])
def test_wilson_covers_at_least_nearly_95_percent_with_ties_as_halves(share, ties):
    rng = np.random.default_rng(0)
    points = rng.choice([1.0, 0.5, 0.0], p=[share - ties / 2, ties, 1 - share - ties / 2], size=(2000, 100)).sum(1)
    covered = np.mean([wilson(total, 100).low <= share <= wilson(total, 100).high for total in points])
    assert covered > 0.925


def test_bootstrap_covers_about_95_percent_of_ratios_over_unequal_units():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        pairs = rng.integers(1, 37, size=60)
        # Prompts differ in how well they are ordered, so their pairs are not independent; the truth is 0.7.
        correct = rng.binomial(pairs, rng.beta(7, 3, size=60))
        _, low, high = bootstrap_ratio(correct, pairs, seed=trial, resamples=400)
        covered += low <= 0.7 <= high
    assert 0.89 < covered / 300 < 0.985


def test_the_ratio_of_sums_is_resampled_and_not_the_mean_of_ratios():
    # 50 prompts with one pair, all right, and 50 with nine pairs, all wrong: 10 % of the pairs are right.
    estimate = bootstrap_ratio([1] * 50 + [0] * 50, [1] * 50 + [9] * 50)
    assert estimate.value == pytest.approx(0.1)
    assert 0.05 < estimate.low < 0.1 < estimate.high < 0.2


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(2).normal(3.0, 2.0, size=4000)
    estimate = bootstrap_mean(values)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 4000**0.5
    assert estimate.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert estimate.high == pytest.approx(values.mean() + half, abs=half / 10)


def test_bootstrap_is_reproducible_and_blocks_do_not_matter(monkeypatch):
    from instructgpt_hf.evaluation import intervals

    values = np.random.default_rng(3).normal(size=50)
    first = bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) == first
    assert bootstrap_mean(values, seed=6) != first
    monkeypatch.setattr(intervals, "_BLOCK", 64)
    assert bootstrap_mean(values, seed=5) == pytest.approx(first)


def test_pairing_sees_what_separate_intervals_hide():
    rng = np.random.default_rng(4)
    first = rng.random(300) < 0.8
    second = first & (rng.random(300) < 0.95)
    estimate = paired_difference(first.tolist(), second.tolist())
    assert estimate.value == pytest.approx(first.mean() - second.mean())
    assert estimate.low > 0
    assert wilson(first.sum(), 300).low < wilson(second.sum(), 300).high


def test_units_without_pairs_do_not_count():
    some = bounded_ratio(np.array([1.0, 0.0, 3.0, 0.0]), np.array([2, 0, 3, 1]))
    assert some == bootstrap_ratio([1, 3, 0], [2, 3, 1])


def test_where_all_units_agree_the_interval_is_wilsons():
    assert bounded_ratio(np.array([2.0] * 20), np.array([2] * 20))[1:] == wilson(20, 20)[1:]
    # Correlations of -0.5 lie a quarter of the way from -1 to 1.
    result = bounded_ratio(np.array([-0.5] * 20), np.ones(20), lowest=-1.0)
    assert result == pytest.approx((-0.5, 2 * wilson(5, 20).low - 1, 2 * wilson(5, 20).high - 1))


def test_resampled_sums_draw_as_many_rows_as_there_are():
    sums = resampled_sums(np.column_stack([np.ones(7), np.arange(7)]), seed=1, resamples=500)
    assert sums.shape == (500, 2)
    assert (sums[:, 0] == 7).all()
    assert sums[:, 1].mean() == pytest.approx(21, abs=1)
    assert sums[:, 1].std() == pytest.approx(np.arange(7).std() * 7**0.5, rel=0.1)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="positive denominators, at least one, got 0 and 0"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="positive denominators"):
        bootstrap_ratio([1, 2], [1, 0])
    with pytest.raises(ValueError, match="same units on both sides, got 1 and 2"):
        paired_difference([1], [1, 2])
