"""Rankings: ranks, scores or pairs; what is left out is counted; padding on either side."""

import pytest
from datasets import Dataset

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings import ranking_rows, ranks_from_scores, tokenize_rankings
from instructgpt_hf.errors import InstructGPTError


def rows_of(*rows):
    return ranking_rows(Dataset.from_list(list(rows)), "rankings")


def problem_of(*rows):
    with pytest.raises(InstructGPTError) as caught:
        rows_of(*rows)
    return str(caught.value)


class TestForms:
    def test_ranks(self):
        row = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [2, 1, 2]}
        assert rows_of({**row, "labeler": "x"}).to_list() == [row]

    def test_scores_become_ranks(self):
        found = rows_of({"prompt": "a", "completions": ["b", "c", "d", "e"], "scores": [0.5, 2.0, 0.5, -1.0]})
        assert found.column_names == ["prompt", "completions", "ranks"]
        assert found[0]["ranks"] == [2, 1, 2, 4]

    @pytest.mark.parametrize(
        ("scores", "ranks"), [([1.0], [1]), ([3, 3, 3], [1, 1, 1]), ([1, 2, 3], [3, 2, 1]), ([5, 1, 5], [1, 3, 1])]
    )
    def test_ranks_from_scores(self, scores, ranks):
        assert ranks_from_scores(scores) == ranks

    def test_pair_with_prompt(self):
        assert rows_of({"prompt": "a", "chosen": "b", "rejected": "c"}).to_list() == [
            {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}
        ]

    def test_pair_of_conversations_without_prompt(self):
        question = {"role": "user", "content": "a"}
        answers = [{"role": "assistant", "content": text} for text in ("b", "c")]
        found = rows_of({"chosen": [question, answers[0]], "rejected": [question, answers[1]]})
        assert found.to_list() == [{"prompt": [question], "completions": ["b", "c"], "ranks": [1, 2]}]

    def test_pair_of_texts_without_prompt(self):
        (found,) = rows_of({"chosen": "a b c d", "rejected": "a b c e"}).to_list()
        assert found["prompt"] == "a b c"
        assert [text.strip() for text in found["completions"]] == ["d", "e"]

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"completions": ["b"], "ranks": [1]}, "row 0: completions: found 1, a ranking needs at least 2"),
            ({"ranks": [1, 2, 3]}, "row 0: ranks: found 3 for 2 completions, expected as many"),
            ({"ranks": [0, 1]}, "row 0: ranks: found [0, 1], expected whole numbers from 1 (the best)"),
            ({"ranks": [1.5, 1.0]}, "row 0: ranks: found [1.5, 1.0], expected whole numbers"),
            ({"ranks": [1, None]}, "row 0: ranks: found [1, None], expected numbers"),
            ({"completions": ["b", " "]}, "row 0: completions: every completion must be non-empty text"),
            ({"prompt": ""}, "row 0: prompt: found '', expected non-empty text"),
        ],
    )
    def test_wrong_row(self, changes, expected):
        assert expected in problem_of({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], **changes})

    def test_wrong_scores(self):
        row = {"prompt": "a", "completions": ["b", "c"]}
        assert "scores: found 1 for 2 completions" in problem_of({**row, "scores": [1.0]})
        assert "scores: found [1.0, nan], expected numbers" in problem_of({**row, "scores": [1.0, float("nan")]})

    def test_wrong_column_names_the_nearest(self):
        found = problem_of({"prompt": "a", "completion": ["b", "c"], "ranks": [1, 2]})
        assert "missing column 'completions' (did you mean 'completion'?)" in found


class TestTokens:
    def tokenize(self, tokenizer, *rows, max_length=20, max_prompt_length=None):
        data = Dataset.from_list(
            [{"prompt": prompt, "completions": texts, "ranks": ranks} for prompt, texts, ranks in rows]
        )
        made = PromptFormat.create("raw", tokenizer)
        return tokenize_rankings(data, made, tokenizer, max_length, "rankings", max_prompt_length)

    def test_ids(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a b", ["c", "d e"], [2, 1]))
        prompt, *completions = [
            tokenizer.convert_tokens_to_ids(text.split()) for text in ("a b", "c <eos>", "d e <eos>")
        ]
        assert rows.to_list() == [{"prompt_ids": prompt, "completion_ids": completions, "ranks": [2, 1]}]
        assert counts == {"dropped_duplicates": 0, "dropped_completions": 0, "dropped_too_few": 0, "dropped_ties": 0}

    def test_long_completion_leaves_its_ranking_with_its_rank(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a", ["b", "b c d e", "c"], [1, 2, 3]), max_length=4)
        assert rows[0]["ranks"] == [1, 3] and [len(ids) for ids in rows[0]["completion_ids"]] == [2, 2]
        assert counts == {"dropped_duplicates": 0, "dropped_completions": 1, "dropped_too_few": 0, "dropped_ties": 0}

    def test_duplicate_is_kept_once_and_counted(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a", ["b", "c", " b ", "b"], [2, 1, 2, 2]))
        assert rows[0]["ranks"] == [2, 1] and len(rows[0]["completion_ids"]) == 2
        assert counts["dropped_duplicates"] == 2 and counts["dropped_completions"] == 0

    def test_what_is_left_out_is_counted(self, tokenizer):
        rows, counts = self.tokenize(
            tokenizer,
            ("a", ["b", "c"], [1, 2]),
            ("a", ["b", "c", "d"], [1, 1, 1]),
            ("a", ["b", "b c d e f"], [1, 2]),
            ("a", ["b", "c", "b c d e f"], [1, 1, 2]),
            max_length=4,
        )
        assert rows["ranks"][0] == [1, 2] and len(rows) == 1
        assert counts == {"dropped_duplicates": 0, "dropped_completions": 2, "dropped_too_few": 1, "dropped_ties": 2}

    def test_long_prompt_leaves_with_its_ranking(self, tokenizer):
        rows, counts = self.tokenize(
            tokenizer, ("a a a", ["b", "c"], [1, 2]), ("a", ["b", "c"], [1, 2]), max_prompt_length=2
        )
        assert len(rows) == 1 and counts["dropped_too_few"] == 1 and counts["dropped_completions"] == 2

    def test_nothing_left(self, tokenizer):
        with pytest.raises(
            InstructGPTError, match=r"of 2 prompts, 1 keep fewer than two.*max_length=4.*1 have only ties"
        ):
            self.tokenize(tokenizer, ("a", ["b", "c"], [1, 1]), ("a", ["b", "b c d e"], [1, 2]), max_length=4)
