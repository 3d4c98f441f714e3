"""The rankings a reward stage trains on and holds back: from tables and streams, never one prompt on both sides."""

import io
import json

import pytest
from datasets import IterableDataset
from helpers.stage_files import write_model, write_recipe, write_rows
from rich.console import Console

from instructgpt_hf import lab, pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.data import RewardArguments
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.data.sources import Sources
from instructgpt_hf.data.splits import hold_back, prompt_keys, read_rankings
from instructgpt_hf.errors import InstructGPTError


def rankings(count, labelers=1):
    return [
        {"prompt": f"question {index}", "completions": ["b", "c"], "ranks": [1, 2], "labeler": f"l{labeler}"}
        for labeler in range(labelers)
        for index in range(count)
    ]


@pytest.fixture
def read(tmp_path):
    def build(name, **arguments):
        def lab_folder():
            lab.write(tmp_path / "lab")
            return tmp_path / "lab"

        sources = Sources(lab_folder)
        train, test = read_rankings(sources, RewardArguments(dataset_name=str(name), **arguments))
        if test is None:
            train, test = hold_back(train, prompt_keys(train["prompt"]), f"rankings: {name}")
        return sources.records, train, test

    return build


def prompts(rows):
    """Text of the prompts, which are messages in a stream."""
    return [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"] for row in rows]


class TestTables:
    def test_a_tenth_of_the_prompts_is_held_back(self, read, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", rankings(40))
        records, train, test = read(path)
        assert len(test) == 4 and len(train) == 36 and not set(prompts(train)) & set(prompts(test))
        assert records["rankings"]["schema"] == "rankings"
        assert records["rankings"]["rows"] == 40

    def test_rankings_of_a_prompt_stay_together(self, read, tmp_path):
        _, train, test = read(write_rows(tmp_path / "data.jsonl", rankings(30, labelers=3)))
        assert len(test) == 9 and len(train) == 81 and not set(prompts(train)) & set(prompts(test))

    def test_one_completion_per_row_is_put_together_first(self, read, tmp_path):
        rows = [
            {"prompt": f"q {index}", "completion": text, "score": score}
            for text, score in [("b", 1), ("c", 2), ("d", 3)]
            for index in range(20)
        ]
        _, train, test = read(write_rows(tmp_path / "data.jsonl", rows))
        assert len(train) == 18 and len(test) == 2 and {len(row["ranks"]) for row in [*train, *test]} == {3}

    def test_test_split(self, read, tmp_path):
        write_rows(tmp_path / "train.jsonl", rankings(3))
        write_rows(tmp_path / "test.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
        records, train, test = read(tmp_path, dataset_test_split="test")
        assert len(train) == 3 and prompts(test) == ["a"]
        assert records["rankings_test"]["rows"] == 1

    def test_the_lab_brings_its_test_split(self, read):
        records, train, test = read("lab:rankings")
        assert not set(prompts(train)) & set(prompts(test))
        assert records["rankings"]["source"] == "lab:rankings"

    @pytest.mark.parametrize(("labelers", "found"), [(1, "1 row"), (2, "2 rows of one prompt")])
    def test_one_prompt_is_too_few(self, read, tmp_path, labelers, found):
        path = write_rows(tmp_path / "data.jsonl", rankings(1, labelers))
        with pytest.raises(InstructGPTError, match=f"rankings: {path} has {found}; at least 2 are needed"):
            read(path)


class TestStreams:
    def test_first_rows_are_held_back(self, read, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", rankings(230))
        records, train, test = read(path, streaming=True)
        assert isinstance(train, IterableDataset)
        assert prompts(test) == [f"question {index}" for index in range(200)]
        assert prompts(train) == [f"question {index}" for index in range(200, 230)]
        assert ranking_rows(train, "again") is train
        noted = records["rankings"]
        assert noted["streaming"] is True and noted["rows"] is None and noted["held_back"] == 200

    def test_a_prompt_that_comes_back_is_not_trained_on(self, read, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", [*rankings(230), *rankings(10)])
        _, train, test = read(path, streaming=True)
        assert len(list(train)) == 30 and not set(prompts(train)) & set(prompts(test))

    def test_only_prompts_that_come_back(self, read, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", [*rankings(200), *rankings(10)])
        with pytest.raises(InstructGPTError, match="every prompt is among those of its first 200 rows"):
            read(path, streaming=True)

    def test_test_split_is_read_whole(self, read, tmp_path):
        write_rows(tmp_path / "train.jsonl", rankings(3))
        write_rows(tmp_path / "test.jsonl", rankings(2))
        _, train, test = read(tmp_path, dataset_test_split="test", streaming=True)
        assert len(list(train)) == 3 and len(test) == 2

    def test_a_short_stream_has_nothing_to_train_on(self, read, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", rankings(200))
        with pytest.raises(InstructGPTError, match="has 200 rows; a stream needs more"):
            read(path, streaming=True)

    def test_wrong_row_behind_the_held_back_ones(self, read, tmp_path):
        rows = rankings(230)
        rows[210]["ranks"] = [1, 3]
        _, train, _ = read(write_rows(tmp_path / "data.jsonl", rows), streaming=True)
        with pytest.raises(InstructGPTError, match=r"data.jsonl: row 210: ranks: found \[1, 3\]"):
            list(train)

    def test_fingerprint_sees_the_file_change(self, read, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", rankings(230))
        first, again = (read(path, streaming=True)[0]["rankings"]["fingerprint"] for _ in range(2))
        assert first == again
        other = rankings(230)
        other[229]["ranks"] = [2, 1]
        write_rows(tmp_path / "data.jsonl", other)
        assert read(path, streaming=True)[0]["rankings"]["fingerprint"] != first

    def test_fingerprint_of_a_hub_stream_is_its_revision(self, monkeypatch):
        from instructgpt_hf.data import sources

        assert sources.describe_stream("nobody-here/no-such-dataset", "train", None)["revision"] is None  # offline
        fingerprints = set()
        for commit in ("abc", "abc", "def"):
            monkeypatch.setattr(sources, "hub_revision", lambda name, commit=commit: commit)
            noted = sources.describe_stream("org/rankings", "train", None)
            assert noted["revision"] == commit
            fingerprints.add(noted["fingerprint"])
        assert (
            len(fingerprints) == 2
            and sources.describe_stream("org/rankings", "test", None)["fingerprint"] not in fingerprints
        )


def test_a_stage_on_a_stream(tmp_path, tokenizer):
    """What it leaves out is counted as it is read; a second run finds it finished."""
    write_model(tmp_path / "base", tokenizer)
    demonstrations = [{"prompt": f"a {word}", "completion": word} for word in "bcdefghijk"]
    rows = [
        {
            "prompt": f"a w{index % 30}" if index < 200 else f"{'b' * (index - 199)} a",
            "completions": ["b", "c d", "e f g"],
            "ranks": [2, 1, 1 if index % 2 else None],
        }
        for index in range(230)
    ]
    common = {"use_cpu": True, "max_length": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    sft = {"model_name_or_path": str(tmp_path / "base"), "prompt_template": "raw", "max_steps": 1}
    data = write_rows(tmp_path / "demonstrations.jsonl", demonstrations), write_rows(tmp_path / "r.jsonl", rows)
    stages = {
        "sft": {**common, **sft, "dataset_name": data[0]},
        "reward": {
            **common,
            **{"dataset_name": data[1], "streaming": True, "max_steps": 3},
            **{"eval_strategy": "steps", "eval_steps": 1},
        },
    }
    recipe = write_recipe(tmp_path / "recipe", stages)
    for stage in ("sft", "reward"):
        pipeline.run_stage(load_recipe(recipe, stages=[stage]), stage, tmp_path / "run")
    record = StageArtifact.load(tmp_path / "run" / "reward")
    noted = record.data["rankings"]
    assert record.training["steps"] == 3 and noted["rows"] is None and noted["held_back"] == 200
    # Every second row has an unranked completion, every other one loses its longest: 2 + 4 tokens are too many.
    assert noted["dropped_unranked"] + noted["dropped_completions"] >= 12 and noted["dropped_unranked"] >= 6
    assert noted["dropped_too_few"] == noted["dropped_ties"] == 0
    measured = [entry for entry in record.training["log"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in measured] == [1, 2, 3, 3]  # the last one is the stage's own
    assert all({"eval_length_baseline_accuracy", "eval_ece", "eval_kendall_tau"} <= entry.keys() for entry in measured)
    assert record.metrics["eval_accuracy"] == measured[-1]["eval_accuracy"]
    written = json.loads((tmp_path / "run" / "reward" / "evaluation.json").read_text())
    assert written["accuracy"]["accuracy"] == record.metrics["eval_accuracy"]
    assert (tmp_path / "run" / "reward" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=200)
    pipeline.run_stage(load_recipe(recipe, stages=["reward"]), "reward", tmp_path / "run", console)
    assert "already finished and unchanged" in console.file.getvalue()
