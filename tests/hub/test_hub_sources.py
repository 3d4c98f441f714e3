"""What may leave the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_run import record

from instructgpt_hf.hub.sources import is_repo_id, public_artifact, public_source, scrub


@pytest.mark.parametrize("source", ["gpt2", "org/model", "HuggingFaceTB/SmolLM2-135M-Instruct", "a.b/c_d-1.4b"])
def test_hub_ids(source: str) -> None:
    assert is_repo_id(source)
    assert public_source(source) == source


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/bob/data", "./data"),
        ("~/models/smol/", "./smol"),
        ("./runs/sft", "./sft"),
        ("../sft", "./sft"),
        ("runs/tiny-cpu/sft", "./sft"),
        ("data/rankings.jsonl", "./rankings.jsonl"),
        ("C:\\Users\\bob\\sft", "./sft"),
        ("", "./folder"),
    ],
)
def test_local_paths_shrink_to_their_name(source: str, shown: str) -> None:
    assert not is_repo_id(source)
    assert public_source(source) == shown
    assert public_source(shown) == shown


def test_other_sources_stay() -> None:
    assert public_source("lab:rankings") == "lab:rankings"
    assert public_source(None) is None


def test_a_folder_on_disk_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_source("runs/sft", check_disk=True) == "./sft"
    assert public_source("runs/sft") == public_source("runs/sft", check_disk=False) == "runs/sft"
    assert public_source("runs/other", check_disk=True) == "runs/other"


def test_cached_downloads_are_the_repository_they_came_from() -> None:
    path = f"/home/bob/.cache/huggingface/hub/models--org--base-1.4b/snapshots/{'0' * 40}"
    assert public_source(path) == "org/base-1.4b"
    assert public_source("lab") == "lab"


def test_scrub_cuts_paths_inside_text_and_keeps_urls() -> None:
    assert scrub("saved to /home/bob/runs/sft.") == "saved to sft."
    assert scrub("see https://example.org/a/b/c") == "see https://example.org/a/b/c"
    assert scrub("yes and/or no, 1/2/3, </s>") == "yes and/or no, 1/2/3, </s>"
    assert scrub({"token": "x", "list": ["hf_abcdefghijklmnop"]}) == {"list": ["hf_***"]}


def test_nothing_local_is_left_in_a_record() -> None:
    artifact = record("ppo-ptx", run="/home/bob/runs/tiny")
    artifact.config |= {
        "hub_token": "hf_abcdefghijklmnop",
        "sft_model_path": "/home/bob/runs/tiny/sft",
        "dataset_name": "/home/bob/secret/prompts.jsonl",
        "extra_reward_model_paths": ["bob/run/reward", "/home/bob/other", "alice/helpful"],
        "value_model_path": "bob/run/ppo/value_model",
    }
    artifact.previous["reward"]["source"] = "/home/bob/elsewhere/reward"
    artifact.training["log"].append({"message": "checkpoint in /home/bob/runs/tiny/checkpoint-1"})
    artifact.base_model["id"] = "/home/bob/base"
    shown = public_artifact(artifact, {"sft": "alice/tiny-sft"})
    text = json.dumps(vars(shown))
    assert "bob" not in text and "hf_abc" not in text
    assert shown.previous["sft"]["source"] == shown.config["sft_model_path"] == "alice/tiny-sft"
    assert shown.previous["reward"]["source"] == "./reward"
    assert shown.base_model["id"] == "./base"
    assert shown.config["extra_reward_model_paths"] == ["./reward", "./other", "alice/helpful"]
    assert shown.config["value_model_path"] == "./value_model"
    assert shown.prompt_format == artifact.prompt_format
    assert "/home/bob" in artifact.base_model["id"]  # the original is untouched
