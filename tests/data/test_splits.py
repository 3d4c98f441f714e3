"""What is held back: usable rows, never an equal prompt on both sides, the same in every stage."""

import gzip
import json

import pytest
from datasets import Dataset
from helpers.turns import assistant, user

from instructgpt_hf.config.data import PPOArguments, SFTArguments
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.sources import Sources
from instructgpt_hf.data.splits import (
    demonstration_keys,
    hold_back,
    prompt_keys,
    read_demonstration_source,
    read_pretraining,
    read_prompts,
    test_split,
)
from instructgpt_hf.errors import InstructGPTError

test_split.__test__ = False


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestHoldBack:
    @pytest.mark.parametrize(("count", "held_back"), [(2, 1), (19, 1), (40, 4), (3_000, 200)])
    def test_number(self, count, held_back):
        rows = Dataset.from_dict({"prompt": [f"p{number}" for number in range(count)]})
        train, test = hold_back(rows, rows["prompt"], "x")
        assert len(test) == held_back and len(train) == count - held_back

    def test_equal_keys_stay_together_whatever_the_order(self):
        prompts = [f"p{number % 50}" for number in range(150)]
        rows = Dataset.from_dict({"prompt": prompts})
        train, test = hold_back(rows, prompts, "x")
        assert len(test) == 15 and not set(train["prompt"]) & set(test["prompt"])
        backwards = Dataset.from_dict({"prompt": prompts[::-1]})
        assert set(hold_back(backwards, backwards["prompt"], "x").test["prompt"]) == set(test["prompt"])

    def test_parts_of_a_conversation_have_one_key(self):
        first = [user("a")]
        later = [*first, assistant("b"), user("c")]
        assert len(set(prompt_keys([first, later]))) == 1 and prompt_keys(["a"]) != prompt_keys(["b"])
        rows = Dataset.from_dict({"prompt": [None, None], "completion": ["a", "b"]})
        assert len(set(demonstration_keys(rows))) == 2

    def test_one_prompt(self):
        rows = Dataset.from_dict({"prompt": ["a"] * 3})
        with pytest.raises(InstructGPTError, match="x has 3 rows of one prompt; at least 2 are needed"):
            hold_back(rows, rows["prompt"], "x")


class TestPrompts:
    @pytest.fixture
    def read(self, tokenizer):
        def build(path, limit=None, **arguments):
            made = PromptFormat.create("raw", tokenizer)
            arguments = PPOArguments(dataset_name=str(path), **arguments)
            return read_prompts(Sources(None), arguments, made, tokenizer, limit)

        return build

    def test_only_usable_rows_are_held_back(self, read, tmp_path):
        """Also where every row but two is over the limit."""
        rows = [{"prompt": "a b c d e"} for _ in range(30)] + [{"prompt": "a"}, {"prompt": "b"}]
        (train, test), counts = read(write(tmp_path / "data.jsonl", rows), limit=2)
        assert len(train) == len(test) == 1 and counts["dropped_too_long"] == 30

    def test_the_split_test_of_a_folder(self, read, tmp_path):
        write(tmp_path / "train.jsonl", [{"prompt": f"a {n}"} for n in range(20)])
        write(tmp_path / "test.jsonl", [{"prompt": "b"}])
        (train, test), _ = read(tmp_path)
        assert len(train) == 20 and test["prompt"][:] == ["b"]

    def test_the_file_chosen_by_name_has_no_test_split(self, read, tmp_path):
        path = write(tmp_path / "train.jsonl", [{"prompt": f"a {n}"} for n in range(20)])
        write(tmp_path / "test.jsonl", [{"prompt": "b"}])
        (train, test), _ = read(path)
        assert len(train) == 18 and len(test) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.jsonl"], None),
        (["train.jsonl", "test.csv"], "test"),
        (["train.jsonl", "test.jsonl.gz"], "test"),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], "test"),
    ],
)
def test_test_split_of_a_folder(tmp_path, files, expected):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with (gzip.open if name.endswith("gz") else open)(path, "wt") as stream:
            stream.write("prompt\na\n" if ".csv" in name else '{"prompt": "a"}\n')
    assert test_split(PPOArguments(dataset_name=str(tmp_path))) == expected
    assert test_split(PPOArguments(dataset_name=str(tmp_path), dataset_test_split="train")) == "train"


def test_demonstrations_of_two_splits(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    write(tmp_path / "test.jsonl", [{"messages": [user("c"), assistant("d")]}])
    source = read_demonstration_source(Sources(None), SFTArguments(dataset_name=str(tmp_path)))
    assert source.train["completion"][:] == ["b"] and source.test["completion"][:] == ["d"]


def test_equal_documents_are_on_one_side(tmp_path):
    rows = [{"text": f"a {number % 40}"} for number in range(200)]
    name = write(tmp_path / "text.jsonl", [*rows, {"text": ""}])
    sources = Sources(None)
    train, test = read_pretraining(sources, SFTArguments(pretraining_dataset_name=name), "pretraining_mix", 0.1)
    assert len(test) == 10 and not set(train["text"]) & set(test["text"])
    assert sources.records["pretraining"]["dropped_empty"] == 1
