"""Rankings: ranks, scores or pairs; wrong rows are named; what is left out is counted; streams equal tables."""

import json

import pytest
from datasets import Dataset

from instructgpt_hf.data.messages import to_messages
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import ranking_rows, tokenize_rankings
from instructgpt_hf.data.rankings.schemas import ranks_from_scores
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.errors import InstructGPTError

COMPLETIONS = ("dropped_unranked", "dropped_duplicates", "dropped_contradictions", "dropped_completions")
NOTHING = dict.fromkeys([*COMPLETIONS, "dropped_too_few", "dropped_ties"], 0)


def rows_of(*rows):
    return ranking_rows(Dataset.from_list(list(rows)), "rankings").remove_columns("row")


def problem_of(*rows):
    with pytest.raises(InstructGPTError) as caught:
        rows_of(*rows)
    return str(caught.value)


class TestForms:
    def test_ranks(self):
        row = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [2, 1, 2]}
        assert rows_of({**row, "other": "x"}).to_list() == [{**row, "unranked": 0}]

    def test_labeler_is_kept(self):
        row = {"prompt": "a", "completions": ["b", "c"], "ranks": [2, 1]}
        assert rows_of({**row, "labeler": 7}).to_list() == [{**row, "unranked": 0, "labeler": "7"}]

    def test_the_one_form_comes_back_unchanged(self):
        found = rows_of({"prompt": "a", "completions": ["b", "c", "d"], "ranks": [2, 1, None]})
        assert ranking_rows(found, "again") is found

    def test_scores_become_ranks(self):
        found = rows_of({"prompt": "a", "completions": ["b", "c", "d", "e"], "scores": [0.5, 2.0, 0.5, -1.0]})
        assert found.column_names == ["prompt", "completions", "ranks", "unranked"]
        assert found[0]["ranks"] == [2, 1, 2, 4]

    @pytest.mark.parametrize(
        ("scores", "ranks"), [([1.0], [1]), ([3, 3, 3], [1, 1, 1]), ([1, 2, 3], [3, 2, 1]), ([5, 1, 5], [1, 3, 1])]
    )
    def test_ranks_from_scores(self, scores, ranks):
        assert ranks_from_scores(scores) == ranks

    @pytest.mark.parametrize("size", [2, 4, 9, 12])
    def test_any_number_of_completions(self, size):
        texts, ranks = [f"answer {index}" for index in range(size)], list(range(size, 0, -1))
        assert rows_of({"prompt": "a", "completions": texts, "ranks": ranks})[0]["ranks"] == ranks

    def test_mixed_numbers_of_completions(self):
        found = rows_of(
            {"prompt": "a", "completions": ["b", "c"], "ranks": [2, 1]},
            {"prompt": "d", "completions": ["e", "f", "g", "h"], "ranks": [1, 1, 1, 1]},
        )
        assert found["ranks"][:] == [[2, 1], [1, 1, 1, 1]]

    @pytest.mark.parametrize(
        "ranks", [[1, 1, 3], [1, 1, 2], [3, 1, 1], [1, 2, 2], [1, 1, 1], [1.0, 2.0, 3.0], [2, 1, 3]]
    )
    def test_places_and_consecutive_ranks(self, ranks):
        assert rows_of({"prompt": "a", "completions": ["b", "c", "d"], "ranks": ranks})[0]["ranks"] == ranks

    @pytest.mark.parametrize(("form", "values"), [("ranks", [2, None, 1]), ("scores", [0.25, None, 3.5])])
    def test_completion_that_was_not_ranked_leaves(self, form, values):
        (found,) = rows_of({"prompt": "a", "completions": ["b", "c", "d"], form: values}).to_list()
        assert found == {"prompt": "a", "completions": ["b", "d"], "ranks": [2, 1], "unranked": 1}

    def test_completions_of_one_message(self):
        completions = [[{"role": "assistant", "content": text}] for text in ("b", "c")]
        question = [{"role": "user", "content": "a"}]
        (found,) = rows_of({"prompt": question, "completions": completions, "ranks": [1, 2]}).to_list()
        assert found == {"prompt": question, "completions": ["b", "c"], "ranks": [1, 2], "unranked": 0}

    @pytest.mark.parametrize("first", ["text", "messages"])
    def test_text_among_chat_prompts_is_a_message(self, tmp_path, first):
        question = {"role": "user", "content": "a"}
        prompts = ["a", [question]] if first == "text" else [[question], "a"]
        rows = [{"prompt": prompt, "completions": ["b", "c"], "ranks": [1, 2]} for prompt in prompts]
        path = tmp_path / "mixed.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        data = load_split(str(path), "train")
        assert ranking_rows(data, "rankings")["prompt"][:] == [[question], [question]]

    def test_pair_with_prompt(self):
        assert rows_of({"prompt": "a", "chosen": "b", "rejected": "c"}).to_list() == [
            {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "unranked": 0}
        ]

    def test_pair_of_conversations_without_prompt(self):
        question = {"role": "user", "content": "a"}
        completions = [{"role": "assistant", "content": text} for text in ("b", "c")]
        found = rows_of({"chosen": [question, completions[0]], "rejected": [question, completions[1]]})
        assert found.to_list() == [{"prompt": [question], "completions": ["b", "c"], "ranks": [1, 2], "unranked": 0}]

    @pytest.mark.parametrize(
        "pair",
        [("Q: sky? A: Blue", "Q: sky? A: Blueish"), ("Answer: Paris.", "Answer: Parma."), ("a b c d", "a b c e")],
    )
    def test_pair_of_texts_without_prompt(self, pair):
        """A prompt is never cut out of what two answers begin with."""
        found = problem_of(dict(zip(("chosen", "rejected"), pair, strict=True)))
        assert "rankings: missing column 'prompt'; it has 'chosen', 'rejected'. Pairs of text need" in found


class TestWrongRows:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"completions": ["b"], "ranks": [1]}, "completions: found 1, a ranking needs at least 2"),
            ({"completions": None}, "completions: found None, expected a list"),
            ({"ranks": [1, 2, 3]}, "ranks: found 3 for 2 completions, expected as many"),
            ({"ranks": None}, "ranks: found None for 2 completions, expected as many"),
            ({"ranks": [0, 1]}, "ranks: found [0, 1], expected whole numbers from 1 (the best)"),
            ({"ranks": [1.5, 1.0]}, "ranks: found [1.5, 1.0], expected whole numbers"),
            ({"ranks": ["first", "second"]}, "ranks: found ['first', 'second'], expected numbers"),
            ({"ranks": [True, False]}, "ranks: found [True, False], expected numbers"),
            ({"ranks": [1, 3]}, "ranks: found [1, 3], which skip a rank"),
            ({"ranks": [2, 3]}, "ranks: found [2, 3], which skip a rank"),
            ({"ranks": [1, 4, None], "completions": ["b", "c", "d"]}, "ranks: found [1, 4, None], which skip a rank"),
            ({"ranks": [1, 1, 4], "completions": ["b", "c", "d"]}, "ranks: found [1, 1, 4], which skip a rank"),
            (
                {"ranks": [1, 1, 3, 4, 4, 5], "completions": list("bcdefg")},
                "ranks: found [1, 1, 3, 4, 4, 5], which skip a rank",
            ),
            ({"completions": ["b", " "]}, "completions: number 1: found ' ', expected non-empty text"),
            ({"completions": ["b", None]}, "completions: number 1: found None, expected non-empty text"),
            ({"completions": ["b", " b\n"]}, "completions: numbers 0 and 1 are the same text, ranked 1 and 2"),
            (
                {"completions": [[{"role": "user", "content": "b"}]] * 2},
                "completions: number 0: turn 0: found role 'user' ('b'), expected 'assistant'",
            ),
            ({"completions": "b"}, "completions: found 'b', which is neither JSON nor a Python list"),
            ({"prompt": ""}, "prompt: found '', expected non-empty text"),
            (
                {"prompt": [{"role": "user", "content": None}]},
                "prompt: turn 0 (user): content is null",
            ),
        ],
    )
    def test_wrong_row(self, changes, expected):
        row = {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}
        assert f"- row 0: {expected}" in problem_of({**row, **changes})

    def test_all_wrong_rows_of_a_dataset_are_named(self):
        right = {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}
        rows = [{**right, "ranks": [1, 3]} if index % 5 == 3 else right for index in range(2_000)]
        message = problem_of(*rows)
        assert "row 3: ranks" in message and "row 98: ranks" in message and "... and 380 more" in message

    def test_wrong_scores(self):
        row = {"prompt": "a", "completions": ["b", "c"]}
        assert "scores: found 1 for 2 completions" in problem_of({**row, "scores": [1.0]})
        assert "scores: found [1.0, nan], expected numbers" in problem_of({**row, "scores": [1.0, float("nan")]})
        assert "scores: found [1.0, inf], expected numbers" in problem_of({**row, "scores": [1.0, float("inf")]})

    def test_same_text_scored_differently(self):
        found = problem_of({"prompt": "a", "completions": ["b", "c", "b"], "scores": [1.0, 2.0, 3.0]})
        assert "row 0: completions: numbers 0 and 2 are the same text, ranked 1.0 and 3.0" in found

    def test_only_the_first_row_is_wrong(self):
        turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in "bc"]
        found = problem_of({"chosen": None, "rejected": turns[0]}, {"chosen": turns[0], "rejected": turns[1]})
        assert "row 0: " in found and "row 1" not in found

    @pytest.mark.parametrize("form", ["ranks", "scores"])
    def test_values_that_are_missing_in_a_row(self, form):
        right = {"prompt": "a", "completions": ["b", "c"], form: [1, 2]}
        message = problem_of(right, {"prompt": "a", "completions": ["b", "c"]})
        assert f"row 1: {form}: found None for 2 completions" in message

    def test_a_column_that_is_missing_in_a_row(self):
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "d", "rejected": None}]
        assert "row 1: rejected: found None, expected non-empty text" in problem_of(*rows)

    def test_pair_of_two_conversations(self):
        turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": "b"}] for word in "ac"]
        found = problem_of({"chosen": turns[0], "rejected": turns[1]})
        assert "row 0: chosen and rejected do not continue the same conversation" in found

    def test_wrong_column_names_the_nearest(self):
        found = problem_of({"prompt": "a", "completion": ["b", "c"], "ranks": [1, 2]})
        assert "rankings: missing column 'completions' (did you mean 'completion'?); it has 'prompt'" in found
        assert "- nectar: prompt, answers (berkeley-nest/Nectar)" in found


class TestTokens:
    def tokenize(self, tokenizer, *rows, max_length=20, max_prompt_length=None):
        data = Dataset.from_list(
            [{"prompt": prompt, "completions": texts, "ranks": ranks} for prompt, texts, ranks in rows]
        )
        made = PromptFormat.create("raw", tokenizer)
        return tokenize_rankings(data, made, tokenizer, max_length, "rankings", max_prompt_length)[:2]

    def test_ids(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a b", ["c", "d e"], [2, 1]))
        prompt, *completions = [
            tokenizer.convert_tokens_to_ids(text.split()) for text in ("a b", "c <eos>", "d e <eos>")
        ]
        assert rows.to_list() == [{"prompt_ids": prompt, "completion_ids": completions, "ranks": [2, 1]}]
        assert counts == NOTHING

    def test_long_completion_leaves_its_ranking_with_its_rank(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a", ["b", "b c d e", "c"], [1, 2, 3]), max_length=4)
        assert rows[0]["ranks"] == [1, 3] and [len(ids) for ids in rows[0]["completion_ids"]] == [2, 2]
        assert counts == {**NOTHING, "dropped_completions": 1}

    def test_the_limit_counts_prompt_completion_and_eos(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a a a", ["b", "b c", "b c d"], [1, 2, 3]), max_length=6)
        assert rows[0]["ranks"] == [1, 2] and counts == {**NOTHING, "dropped_completions": 1}

    def test_duplicate_is_kept_once_and_counted(self, tokenizer):
        rows, counts = self.tokenize(tokenizer, ("a", ["b", "c", " b ", "b"], [2, 1, 2, 2]))
        assert rows[0]["ranks"] == [2, 1] and len(rows[0]["completion_ids"]) == 2
        assert counts == {**NOTHING, "dropped_duplicates": 2}

    def test_completions_that_render_equal_but_rank_differently_all_leave(self, tokenizer):
        """Both are unknown words here, so the model would see one text with two ranks."""
        rows, counts = self.tokenize(tokenizer, ("a", ["!", "b", "?", "c"], [1, 2, 3, 4]))
        assert rows[0]["ranks"] == [2, 4]
        assert counts == {**NOTHING, "dropped_contradictions": 2}

    def test_unranked_completions_and_their_prompts_are_counted(self, tokenizer):
        data = ranking_rows(
            Dataset.from_list(
                [
                    {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, None, 2]},
                    {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [None, None, 1]},
                    {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [None, None, None]},
                ]
            ),
            "rankings",
        )
        rows, counts = tokenize_rankings(data, PromptFormat.create("raw", tokenizer), tokenizer, 20, "rankings")[:2]
        assert rows["ranks"][:] == [[1, 2]]
        assert counts == {**NOTHING, "dropped_unranked": 6, "dropped_too_few": 2}

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
        assert counts == {**NOTHING, "dropped_completions": 2, "dropped_too_few": 1, "dropped_ties": 2}

    def test_long_prompt_leaves_with_its_ranking(self, tokenizer):
        rows, counts = self.tokenize(
            tokenizer, ("a a a", ["b", "c"], [1, 2]), ("a a", ["b", "c"], [1, 2]), max_prompt_length=2
        )
        assert len(rows) == 1 and counts["dropped_too_few"] == 1 and counts["dropped_completions"] == 2

    def test_nothing_left(self, tokenizer):
        with pytest.raises(
            InstructGPTError, match=r"of 2 prompts, 1 keep fewer than two.*max_length=4.*1 have only ties"
        ):
            self.tokenize(tokenizer, ("a", ["b", "c"], [1, 1]), ("a", ["b", "b c d e"], [1, 2]), max_length=4)


class TestStreams:
    ROWS = (
        {"prompt": "a", "completions": ["b", "c", None], "ranks": [2, 1, None]},
        {"prompt": "a b", "completions": ["c", "d", "d"], "ranks": [1, 1, 1]},
        {"prompt": "c", "completions": ["d", "e f g h", "f"], "ranks": [1, 2, 3]},
        {"prompt": "d", "completions": ["e", "e f g h"], "ranks": [1, 2]},
    )

    def stream(self, tmp_path, *rows):
        path = tmp_path / "rankings.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_split(str(path), "train", streaming=True)

    def messages(self, rows):
        """The rows with prompts as messages, and without their places."""
        dropped = [{name: value for name, value in row.items() if name != "row"} for row in rows]
        return [{**row, "prompt": to_messages(row["prompt"])} for row in dropped]

    def test_equals_the_table(self, tokenizer, tmp_path):
        made = PromptFormat.create("raw", tokenizer)
        table, expected = tokenize_rankings(rows_of(*self.ROWS), made, tokenizer, 4, "rankings")[:2]
        read = ranking_rows(self.stream(tmp_path, *self.ROWS), "rankings")
        assert self.messages(read) == self.messages(rows_of(*self.ROWS))
        stream, counts, _ = tokenize_rankings(read, made, tokenizer, 4, "rankings")
        assert counts == NOTHING  # nothing has been read yet
        assert list(stream) == table.to_list() and len(table) == 2
        assert (
            counts
            == expected
            == {
                **NOTHING,
                "dropped_unranked": 1,
                "dropped_duplicates": 1,
                "dropped_completions": 2,
                "dropped_too_few": 1,
                "dropped_ties": 1,
            }
        )

    def test_wrong_row_is_named_when_it_is_read(self, tmp_path):
        right = self.ROWS[0]
        read = iter(ranking_rows(self.stream(tmp_path, right, right, {**right, "ranks": [1, 3, None]}), "here"))
        assert [next(read)["ranks"], next(read)["ranks"]] == [[2, 1], [2, 1]]
        with pytest.raises(InstructGPTError, match=r"here: row 2: ranks: found \[1, 3, None\], which skip a rank"):
            next(read)

    def test_row_numbers_count_from_the_start_of_the_stream(self, tmp_path):
        right = self.ROWS[0]
        read = ranking_rows(self.stream(tmp_path, right, right, {**right, "prompt": 7}), "here").skip(1)
        with pytest.raises(InstructGPTError, match="row 2: prompt"):
            list(read)

    def test_rows_of_one_completion_each_are_refused(self, tmp_path):
        stream = self.stream(tmp_path, {"prompt": "a", "completion": "b", "rank": 1})
        with pytest.raises(InstructGPTError, match="'long-ranks' cannot be streamed"):
            ranking_rows(stream, "here")
