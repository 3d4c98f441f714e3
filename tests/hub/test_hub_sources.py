"""What may leave the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_run import record

from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.hub.card import render_card
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


def test_a_relative_path_is_no_hub_id() -> None:
    assert public_source("runs/sft", local=True) == "./sft"
    assert public_source("runs/sft") == "runs/sft"
    assert public_source("lab", local=True) == "lab"


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


def relative(place: str | None = "") -> StageArtifact:
    """A PPO record whose sources all have the form of a Hub id; `place` is where they lie, "" for an old record."""

    def origin(name: str) -> dict[str, Any]:
        return {} if place == "" else {"path": place and f"{place}/{name}"}

    artifact = record("ppo", previous={})
    artifact.base_model = {"id": "models/smol", "revision": "main", **origin("smol")}
    artifact.data["prompts"] |= {"source": "data/prompts", **origin("prompts")}
    artifact.previous["reward"] = {"source": "mine/reward", "fingerprint": "f", **origin("reward")}
    artifact.config |= {
        "dataset_name": "data/prompts",
        "reward_model_path": "mine/reward",
        "extra_reward_model_paths": ["mine/other"],
    }
    return artifact


def test_what_was_local_in_training_stays_local_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where none of the paths exists
    for artifact in (relative("/home/bob/place"), relative()):  # the second as earlier versions wrote it
        shown = public_artifact(artifact, as_trained=True)
        assert shown.base_model["id"] == "./smol"
        assert shown.data["prompts"]["source"] == shown.config["dataset_name"] == "./prompts"
        assert shown.previous["reward"]["source"] == shown.config["reward_model_path"] == "./reward"
        assert shown.config["extra_reward_model_paths"] == ["./other"]
        values = yaml.safe_load(str(render_card(shown)).split("---\n")[1])
        assert "base_model" not in values and "datasets" not in values
        assert "bob" not in shown.text()
        assert public_artifact(shown) == public_artifact(shown, as_trained=True) == shown


def test_what_came_from_the_hub_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "smol").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # a folder of that name is another model
    shown = public_artifact(relative(None), as_trained=True)
    assert shown.base_model == {"id": "models/smol", "revision": "main", "path": None}
    values = yaml.safe_load(str(render_card(shown)).split("---\n")[1])
    assert (values["base_model"], values["datasets"]) == ("models/smol", ["data/prompts"])
    old = record("sft", base_model={"id": "org/base", "revision": "abc"})
    assert public_artifact(old, as_trained=True).base_model["id"] == "org/base"


def test_defaults_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path)
    defaults = {"sft_model_path": [None, "§3.5"], "extra_reward_model_paths": [None, "ours"]}
    shown = public_artifact(record("ppo", paper_defaults=defaults), {"sft": "alice/sft"}, as_trained=True)
    assert shown.paper_defaults == defaults


def test_a_local_dataset_is_not_indexed_under_a_hub_id() -> None:
    artifact = record("reward")
    artifact.data["rankings"] |= {"source": "imdb", "path": "/home/bob/imdb"}
    values = yaml.safe_load(str(render_card(artifact)).split("---\n")[1])
    assert values["model-index"][0]["results"][0]["dataset"] == {"type": "local:imdb", "name": "imdb"}
