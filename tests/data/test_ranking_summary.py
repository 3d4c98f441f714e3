"""The summary of a dataset against hand-counted numbers, and what it says the limits drop against what they do."""

import itertools
import json
import random

import pytest
from datasets import Dataset

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import encode_ranking, ranking_rows, tokenize_rankings
from instructgpt_hf.data.rankings.summary import summarize_rankings, words_of

ROWS = (
    {"prompt": "a b", "completions": ["c", "d e", "f g h"], "ranks": [1, 2, 2], "labeler": "x"},
    {"prompt": "a b", "completions": ["c", "d e"], "ranks": [2, 1], "labeler": "y"},
    {"prompt": "c", "completions": ["d", "e", "f"], "ranks": [1, 1, None], "labeler": "x"},
    {"prompt": "d e f g", "completions": ["h", "i", "h"], "ranks": [1, 2, 1], "labeler": "x"},
)


def rows_of(*rows):
    return ranking_rows(Dataset.from_list(list(rows)), "here")


class TestWords:
    @pytest.fixture
    def summary(self):
        return summarize_rankings(rows_of(*ROWS), words_of)

    def test_counts(self, summary):
        assert summary["read"] == {"prompts": 4, "completions": 11}
        assert summary["prompts"] == 3 and summary["completions"] == 7 and summary["by_size"] == {"2": 2, "3": 1}
        assert summary["dropped"] == {
            "dropped_unranked": 1,
            "dropped_duplicates": 1,
            "dropped_contradictions": 0,
            "dropped_completions": 0,
            "dropped_too_few": 0,
            "dropped_ties": 1,
        }

    def test_pairs(self, summary):
        """Strict: 1 > 2 and 1 > 2 (the shorter is better), 2 > 1 (the longer), 1 > 2 (equal lengths)."""
        assert (summary["pairs"], summary["tied_pairs"]) == (4, 1)
        assert summary["longer_is_better"] == (0 + 0 + 1 + 0.5) / 4

    def test_lengths(self, summary):
        assert summary["lengths"]["prompt"] == {"median": 2.0, "p95": pytest.approx(3.7), "max": 4}
        assert summary["lengths"]["completion"] == {"median": 1.0, "p95": pytest.approx(2.55), "max": 3}
        assert summary["lengths"]["together"]["max"] == 5

    def test_labelers(self, summary):
        assert summary["labelers"] == {"count": 2, "rankings": {"x": 3, "y": 1}, "shared_prompts": 1}

    def test_examples_and_plain_json(self, summary):
        assert [example["prompt"] for example in summary["examples"]] == ["a b", "a b"]
        assert json.loads(json.dumps(summary)) == summary


def test_conversation_in_words():
    row = {"prompt": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    assert words_of({**row, "completions": ["d e"], "ranks": [1]})["prompt_ids"] == ["a", "b", "c"]


def test_nothing_to_count():
    summary = summarize_rankings(rows_of({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}), words_of)
    assert summary["longer_is_better"] is None and summary["labelers"] is None and summary["by_size"] == {}


def test_says_what_the_trainer_gets(tokenizer):
    """Random rankings: counts equal those of the tokenization, pairs those of a loop over what it leaves."""
    draw = random.Random(0)
    words = "abcdefgh"
    rows = [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, 6))),
            "completions": [" ".join(draw.choices(words, k=draw.randint(1, 6))) + f" w{i}" for i in range(size)],
            "ranks": draw.choice([list(range(1, size + 1)), [1] * size, [None, *range(1, size)]]),
        }
        for size in draw.choices(range(2, 10), k=200)
    ]
    data, made = rows_of(*rows), PromptFormat.create("raw", tokenizer)
    limits = {"max_length": 9, "max_prompt_length": 5}
    left, counts, _ = tokenize_rankings(data, made, tokenizer, where="here", **limits)
    summary = summarize_rankings(data, lambda row: encode_ranking(row, made, tokenizer), **limits)
    assert summary["dropped"] == counts and min(counts["dropped_completions"], counts["dropped_too_few"]) > 20
    assert summary["prompts"] == len(left) and summary["completions"] == sum(map(len, left["ranks"]))
    strict, longer, tied = 0, 0.0, 0
    for row in left:
        for i, j in itertools.permutations(range(len(row["ranks"])), 2):
            if row["ranks"][i] < row["ranks"][j]:
                strict += 1
                difference = len(row["completion_ids"][i]) - len(row["completion_ids"][j])
                longer += (difference > 0) + 0.5 * (difference == 0)
            tied += i < j and row["ranks"][i] == row["ranks"][j]
    assert (summary["pairs"], summary["tied_pairs"]) == (strict, tied)
    assert summary["longer_is_better"] == pytest.approx(longer / strict)
