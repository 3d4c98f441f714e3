"""The lab's files: reproducible, well-formed, and with nothing of a test split in the training data."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from instructgpt_hf import lab
from instructgpt_hf.lab import world
from instructgpt_hf.lab.files import SIZES
from instructgpt_hf.lab.statements import read, split_sentences
from instructgpt_hf.lab.tasks import COMPOSED, TASKS

DIGEST = """
import hashlib, sys
from pathlib import Path
from instructgpt_hf import lab
for name, path in lab.write(Path(sys.argv[1]), 3).items():
    print(name, hashlib.sha256(path.read_bytes()).hexdigest())
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    paths = lab.write(tmp_path_factory.mktemp("lab") / "new" / "folder", seed=0)
    return {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in paths.items()}


def test_same_seed_same_bytes_whatever_the_hash_seed_and_no_torch(tmp_path: Path) -> None:
    digests = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGEST, str(tmp_path / hash_seed)]
        digests.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert digests[0] == digests[1]
    assert len(digests[0].splitlines()) == len(SIZES)
    here = lab.write(tmp_path / "other seed", 4)
    assert not any(hashlib.sha256(path.read_bytes()).hexdigest() in digests[0] for path in here.values())


def test_every_file_has_its_columns_and_rows(files: dict[str, list[dict[str, Any]]]) -> None:
    columns = {
        "demonstrations": {"prompt", "completion"},
        "rankings": {"prompt", "completions", "ranks"},
        "prompts": {"prompt"},
        "pretraining": {"text"},
        "tasks": {"task", "prompt", "options", "answer"},
    }
    assert files.keys() == SIZES.keys()
    for name, lines in files.items():
        assert len(lines) == SIZES[name]
        assert {frozenset(row) for row in lines} == {frozenset(columns[name.split(".")[0]])}
        assert all(row[key] for row in lines for key in ("prompt", "completion", "text") if key in row)


def test_rankings_have_four_to_nine_different_completions_and_some_ties(
    files: dict[str, list[dict[str, Any]]],
) -> None:
    for name in ("rankings.train", "rankings.test"):
        lines = files[name]
        assert {len(row["completions"]) for row in lines} == set(range(4, 10))
        assert all(len(set(row["completions"])) == len(row["ranks"]) for row in lines)
        assert all(set(row["ranks"]) == set(range(1, max(row["ranks"]) + 1)) for row in lines)
        tied = sum(len(set(row["ranks"])) < len(row["ranks"]) for row in lines)
        assert 0.05 < tied / len(lines) < 0.95


def test_no_prompt_is_in_a_train_and_a_test_file(files: dict[str, list[dict[str, Any]]]) -> None:
    names = ("demonstrations", "rankings", "prompts")
    train = {row["prompt"] for name in names for row in files[f"{name}.train"]}
    test = {row["prompt"] for name in names for row in files[f"{name}.test"]}
    assert not train & test
    assert all(len({row["prompt"] for row in files[f"{name}.train"]}) == SIZES[f"{name}.train"] for name in names)


def test_task_items_are_not_in_the_pretraining_text(files: dict[str, list[dict[str, Any]]]) -> None:
    blocks = [row["text"].splitlines() for row in files["pretraining.train"]]
    lines = {line for block in blocks for line in block}
    pairs = {pair for block in blocks for pair in pairwise(block)}
    for item in files["tasks.test"]:
        *_, before, query = item["prompt"].splitlines()
        solved = query + item["options"][item["answer"]]
        assert (before, solved) not in pairs
        assert item["task"] not in COMPOSED or solved not in lines


def test_pretraining_text_holds_every_task_and_no_instruction(files: dict[str, list[dict[str, Any]]]) -> None:
    text = "\n".join(row["text"] for row in files["pretraining.train"])
    assert 1_000_000 < len(text) < 2_000_000
    assert not any(marker in text for marker in ("User", "Assistant", "?", "Describe", "List", "Please", "Of course"))
    for line in ("fox: red", "fox: animal", "fox: meadow", "fox: foxes", "hot: cold", "three: four"):
        assert line in text


def test_task_items_have_one_right_answer_in_any_place() -> None:
    items = lab.tasks(7, 9 * 40)
    assert Counter(item["task"] for item in items) == dict.fromkeys(TASKS, 40)
    assert {item["answer"] for item in items} == {0, 1, 2, 3}
    for item in items:
        assert len(set(item["options"])) == 4 and all(option.startswith(" ") for option in item["options"])
        assert item["prompt"].endswith(":") and item["prompt"].count("\n") in (2, 4)
    assert lab.tasks(7, 18) == items[:18] != lab.tasks(8, 18)
    colour = next(item for item in items if item["task"] == "colour")
    name = colour["prompt"].splitlines()[-1].rstrip(":")
    assert colour["options"][colour["answer"]] == f" {world.fact(name, 'colour')}"


def test_pretraining_facts_are_true(files: dict[str, list[dict[str, Any]]]) -> None:
    claims = 0
    for row in files["pretraining.test"]:
        subject = None
        for sentence in split_sentences(row["text"]) if ":" not in row["text"] else []:
            said = read(sentence, subject)
            assert said.kind, sentence
            assert all(claim.true for claim in said.claims), sentence
            subject = said.claims[0].subject if said.claims else subject
            claims += len(said.claims)
    assert claims > 300
