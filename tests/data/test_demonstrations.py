"""Demonstrations: three ways to write them, one form; labels on the completion only."""

import pytest
from datasets import Dataset

from instructgpt_hf.data.demonstrations import demonstration_rows, mix_pretraining, tokenize_demonstrations
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError

PROMPT, COMPLETION = [{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"}


@pytest.fixture
def raw(tokenizer):
    return PromptFormat.create("raw", tokenizer)


def tokenized(rows, prompt_format, tokenizer, **limits):
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    return tokenize_demonstrations(data, prompt_format, tokenizer, where="demonstrations", **limits)[:2]


class TestForms:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "a", "completion": "b", "id": 3}, {"prompt": "a", "completion": "b"}),
            ({"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
            ({"prompt": PROMPT, "completion": [COMPLETION]}, {"prompt": PROMPT, "completion": "b"}),
            ({"messages": [*PROMPT, COMPLETION], "source": "x"}, {"prompt": PROMPT, "completion": "b"}),
            ({"prompt": "kept out", "messages": [*PROMPT, COMPLETION]}, {"prompt": PROMPT, "completion": "b"}),
        ],
    )
    def test_accepted(self, row, expected):
        assert demonstration_rows(Dataset.from_list([row]), "demos").to_list() == [{**expected, "row": "row 0"}]

    def test_wrong_column_names_the_nearest(self):
        data = Dataset.from_list([{"prompts": "a", "completion": "b"}])
        with pytest.raises(InstructGPTError, match=r"demos: missing column 'prompt' \(did you mean 'prompts'\?\)"):
            demonstration_rows(data, "demos")

    def test_every_wrong_row_is_named_at_once(self):
        rows = [("a", "b"), ("", "b"), ("a", None), ("a", "  ")]
        data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
        with pytest.raises(InstructGPTError) as caught:
            demonstration_rows(data, "demos")
        lines = str(caught.value).splitlines()
        assert lines[0] == "demos: wrong rows"
        assert [line.split(": found")[0] for line in lines[1:]] == [
            "  - row 1: prompt",
            "  - row 2: completion",
            "  - row 3: completion",
        ]

    @pytest.mark.parametrize("messages", [[], [COMPLETION], PROMPT, [*PROMPT, COMPLETION, *PROMPT]])
    def test_wrong_messages(self, messages):
        data = Dataset.from_list([{"messages": [*PROMPT, COMPLETION]}, {"messages": messages}])
        with pytest.raises(InstructGPTError, match="row 1: messages: "):
            demonstration_rows(data, "demos")


class TestTokens:
    def test_labels_are_the_completion_with_its_eos(self, raw, tokenizer):
        rows, dropped = tokenized([("a b", "c d e")], raw, tokenizer, max_length=10)
        ids = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d", "e", "<eos>"])
        assert rows[0] == {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
        assert dropped == {"dropped_too_long": 0}

    def test_too_long_is_dropped_not_cut(self, raw, tokenizer):
        rows, dropped = tokenized([("a", "b"), ("a", "b c d"), ("a", "b c")], raw, tokenizer, max_length=4)
        assert [len(row["input_ids"]) for row in rows] == [3, 4]
        assert dropped == {"dropped_too_long": 1}

    def test_too_long_prompt_is_dropped(self, raw, tokenizer):
        rows, dropped = tokenized([("a a a", "b"), ("a a", "b")], raw, tokenizer, max_length=9, max_prompt_length=2)
        assert len(rows) == 1 and dropped == {"dropped_too_long": 1}

    def test_all_too_long(self, raw, tokenizer):
        with pytest.raises(InstructGPTError, match=r"max_length=3 tokens.*the shortest has 4 tokens.*prompt 2"):
            tokenized([("a b c", "d"), ("a b", "c")], raw, tokenizer, max_length=3)


class TestMixture:
    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.1, 2), (0.25, 6), (0.5, 18)])
    def test_fraction_counts_examples_of_the_mixture(self, raw, tokenizer, fraction, expected):
        rows, _ = tokenized([("a", "b")] * 18, raw, tokenizer, max_length=9)
        block = tokenizer.convert_tokens_to_ids(["x", "y", "z"])
        mixed = mix_pretraining(rows, iter([block] * 100), fraction, seed=0)
        text = [row for row in mixed if row["input_ids"] == block]
        assert len(text) == expected and len(mixed) == 18 + expected
        assert all(row["labels"] == block for row in text)
        demonstration = next(row for row in mixed if row["input_ids"] != block)
        assert demonstration == rows[0]
        assert len(text) / len(mixed) == pytest.approx(fraction, abs=0.01)

    def test_order_depends_on_the_seed_only(self, raw, tokenizer):
        rows, _ = tokenized([("a", "b")] * 18, raw, tokenizer, max_length=9)
        mixed = [mix_pretraining(rows, iter([[5]] * 9), 0.3, seed)["input_ids"] for seed in (0, 0, 1)]
        assert list(mixed[0]) == list(mixed[1]) != list(mixed[2])
