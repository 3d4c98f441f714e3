"""`data inspect`: reads what the stage reads, fails as the stage fails, prints what matters."""

import io

import pytest
from helpers.stage_files import write_rows
from rich.console import Console

from instructgpt_hf import cli
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.cli.ranking_tables import show
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.inspection import inspect_rankings

ROWS = [
    {"prompt": "a b", "completions": ["c", "d e f g", "e f"], "ranks": [2, 1, 2], "labeler": "x"},
    {"prompt": "a [b]", "completions": ["c", "d e"], "ranks": [1, 2], "labeler": "y"},
]


@pytest.fixture
def rankings(tmp_path):
    return write_rows(tmp_path / "rankings.jsonl", ROWS)


@pytest.fixture
def folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def printed(summary):
    console = Console(file=io.StringIO(), width=100)
    show(summary, console)
    return console.file.getvalue()


class TestSummary:
    def test_words(self, rankings):
        summary = inspect_rankings(rankings)
        assert (summary["schema"], summary["unit"], summary["limits"]) == ("rankings", "words", {})
        assert summary["by_size"] == {"2": 1, "3": 1} and summary["lengths"]["completion"]["max"] == 4

    def test_tokens_and_limits(self, rankings, folder):
        """Prompts have two tokens, completions one more than words: the EOS."""
        summary = inspect_rankings(rankings, tokenizer=str(folder), prompt_template="raw", max_length=6)
        assert summary["lengths"]["completion"]["max"] == 5
        assert summary["dropped"]["dropped_completions"] == 1 and summary["dropped"]["dropped_ties"] == 1
        assert summary["limits"] == {"max_length": 6, "max_prompt_length": 1024}

    def test_prompt_format_of_a_finished_stage(self, rankings, folder, tokenizer):
        made = PromptFormat.create("instruction", tokenizer)
        empty = {"config": {}, "base_model": {}, "fingerprint": "", "data": {}, "seed": 0}
        StageArtifact(stage="sft", recipe="r", prompt_format=made.to_dict(), **empty).save(folder)
        summary = inspect_rankings(rankings, tokenizer=str(folder))
        assert summary["lengths"]["prompt"]["max"] == 6  # ### Instruction: a b ### Response:

    def test_chat_needs_a_chat_template(self, rankings, folder):
        with pytest.raises(InstructGPTError, match="'chat' needs a chat template"):
            inspect_rankings(rankings, tokenizer=str(folder))

    @pytest.mark.parametrize("limit", [None, 5])
    def test_the_lab(self, limit):
        summary = inspect_rankings("lab:rankings", split="test", limit=limit)
        assert summary["read"]["prompts"] == (limit or 200)

    def test_limit(self, rankings):
        assert inspect_rankings(rankings, limit=1)["prompts"] == 1

    def test_pairs(self, tmp_path):
        path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b c", "rejected": "d"}])
        summary = inspect_rankings(path)
        assert summary["schema"] == "pairs" and summary["longer_is_better"] == 1.0


class TestCommand:
    def test_prints(self, rankings, capsys):
        assert cli.main(["data", "inspect", rankings]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for line in (
            "prompts read 2",
            "prompts with 3 completions 1",
            "pairs 3",
            "tied pairs 1",
            "pairs whose better completion is the longer one 66.7%",
            "rankings by x 1",
            "prompt a [b]",
            "rank 1 d e f g",
        ):
            assert line in lines
        assert any("Lengths are in words" in line for line in lines)

    def test_wrong_rows_give_the_error_of_training(self, tmp_path, capsys):
        path = write_rows(tmp_path / "wrong.jsonl", [ROWS[0], {**ROWS[1], "ranks": [1, 3]}])
        assert cli.main(["data", "inspect", path]) == 2
        assert "row 1: ranks: found [1, 3], which skip a rank" in capsys.readouterr().err

    def test_long_texts_are_shortened(self, tmp_path):
        row = {"prompt": "word " * 200, "completions": ["b " * 200, "c"], "ranks": [1, 2]}
        text = printed(inspect_rankings(write_rows(tmp_path / "long.jsonl", [row])))
        assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) < 30 and "..." in text
