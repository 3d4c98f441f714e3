"""Local files and folders; every way in which they can be unusable has its message."""

import pytest
from datasets import Dataset

from instructgpt_hf.data.prompt_rows import prompt_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rows import missing_columns, read_rows
from instructgpt_hf.data.sources import describe, load_split
from instructgpt_hf.data.values import WrongRow
from instructgpt_hf.errors import InstructGPTError

ROWS = [{"prompt": "a b"}, {"prompt": "c"}]
WRITERS = {
    ".jsonl": lambda path: path.write_text('{"prompt": "a b"}\n{"prompt": "c"}\n'),
    ".json": lambda path: path.write_text('[{"prompt": "a b"}, {"prompt": "c"}]'),
    ".csv": lambda path: path.write_text("prompt\na b\nc\n"),
    ".parquet": lambda path: Dataset.from_list(ROWS).to_parquet(str(path)),
}


def problem_of(source, split="train", **more):
    with pytest.raises(InstructGPTError) as caught:
        load_split(str(source), split, role="prompts", **more)
    message = str(caught.value)
    assert message.startswith("prompts: ")
    return message


class TestReading:
    @pytest.mark.parametrize("suffix", sorted(WRITERS))
    def test_file(self, tmp_path, suffix):
        path = tmp_path / f"data{suffix}"
        WRITERS[suffix](path)
        assert list(load_split(str(path), "train")) == ROWS

    def test_folder_with_splits(self, tmp_path):
        WRITERS[".jsonl"](tmp_path / "train.jsonl")
        (tmp_path / "test.csv").write_text("prompt\nd\n")
        assert list(load_split(str(tmp_path), "train")) == ROWS
        assert list(load_split(str(tmp_path), "test")) == [{"prompt": "d"}]

    def test_changed_file_is_read_again(self, tmp_path):
        path = tmp_path / "data.jsonl"
        WRITERS[".jsonl"](path)
        before = describe(load_split(str(path), "train"), str(path), "train")
        assert before["rows"] == 2 and before["source"] == str(path) and before["split"] == "train"
        path.write_text('{"prompt": "other"}\n')
        after = load_split(str(path), "train")
        assert list(after) == [{"prompt": "other"}]
        assert describe(after, str(path), "train")["fingerprint"] != before["fingerprint"]


class TestErrors:
    @pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/nowhere/missing.csv", "~/nowhere/missing"])
    def test_missing(self, name):
        assert problem_of(name) == f"prompts: {name}: no such file or folder."

    def test_neither_path_nor_hub(self):
        message = problem_of("nobody-here/no-such-dataset", config="english")
        assert "'nobody-here/no-such-dataset' (config 'english', split 'train') is neither a local path" in message

    def test_empty_file(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.touch()
        assert f"{path} has no rows" in problem_of(path)

    @pytest.mark.parametrize(("name", "text"), [("data.json", "[]"), ("data.csv", "prompt\n"), ("data.jsonl", "\n\n")])
    def test_file_without_rows(self, tmp_path, name, text):
        path = tmp_path / name
        path.write_text(text)
        assert f"{path} has no rows" in problem_of(path)

    def test_table_without_rows(self, tmp_path):
        path = tmp_path / "data.parquet"
        Dataset.from_dict({"prompt": ["a"]}).select([]).to_parquet(str(path))
        assert problem_of(path) == f"prompts: {path} has no rows."

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("data.jsonl", b'{"prompt": "a"\n'),
            ("data.json", b"{"),
            ("data.parquet", b"no"),
            ("data.jsonl", b"\xff\xfe\x00"),
        ],
    )
    def test_unreadable(self, tmp_path, name, content):
        path = tmp_path / name
        path.write_bytes(content)
        assert f"{path} could not be read as {path.suffix[1:]}: " in problem_of(path)

    def test_unknown_format(self, tmp_path):
        path = tmp_path / "data.txt"
        path.write_text("a")
        assert f"{path}: format '.txt' is not read; convert it to one of .jsonl, .json, .csv, .parquet" in problem_of(
            path
        )

    def test_folder_without_the_split(self, tmp_path):
        (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
        message = problem_of(tmp_path, "test")
        assert f"{tmp_path}: no test.jsonl, .json, .csv or .parquet in it (it has: train.jsonl; " in message

    def test_columns(self):
        message = missing_columns(["promt", "x"], ["prompt", "completion"], "here")
        assert message.startswith("here: missing column 'prompt' (did you mean 'promt'?), 'completion' (")
        assert message.endswith("it has 'promt', 'x'.")

    def test_long_lists_of_wrong_rows_are_counted(self):
        def read(row):
            raise WrongRow(f"bad {row['x']}")

        with pytest.raises(InstructGPTError, match="and 5 more"):
            read_rows([{"x": number} for number in range(25)], "here", read)


class TestRolloutPrompts:
    @pytest.fixture
    def rows(self, tokenizer):
        def build(prompts, limit):
            made = PromptFormat.create("raw", tokenizer)
            data = Dataset.from_list([{"prompt": prompt, "kind": "plain"} for prompt in prompts])
            return prompt_rows(data, made, tokenizer, limit, "prompts")

        return build

    def test_long_prompts_are_dropped_and_other_columns_kept(self, rows):
        kept, counts = rows(["a", "a b c", "a b"], 2)
        assert kept.to_list() == [{"prompt": "a", "kind": "plain"}, {"prompt": "a b", "kind": "plain"}]
        assert counts == {"dropped_empty": 0, "dropped_too_long": 1, "longest_tokens": 2}

    def test_all_too_long(self, rows):
        with pytest.raises(InstructGPTError, match=r"longer than max_prompt_length=1 tokens.*shortest has 2"):
            rows(["a b", "a b c"], 1)

    def test_wrong_row(self, rows):
        with pytest.raises(InstructGPTError, match="row 1: prompt: found ''"):
            rows(["a", ""], 5)
