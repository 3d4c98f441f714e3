"""Repositories of a run: their names, their visibility, and links to stages pushed earlier."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.hub_client import Client
from helpers.local_hub import LocalHub, Repo
from helpers.tiny_run import record

from instructgpt_hf import pipeline
from instructgpt_hf.config.catalog import copy_recipe
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.publish import push_run

PUSH = """
    import json, sys
    from instructgpt_hf.errors import InstructGPTError
    from instructgpt_hf.hub.publish import push_run
    options = json.loads(sys.argv[2])
    try:
        print(json.dumps(push_run(sys.argv[1], None, **options)))
    except InstructGPTError as error:
        print(json.dumps({"error": str(error)}))
"""


@pytest.mark.parametrize("name", ["tiny-cpu-reward", "tiny-cpu-ppo-value"])
def test_public_push_refuses_a_private_repository_before_any_upload(
    hub: LocalHub, client: Client, tiny_run: Path, name: str
) -> None:
    hub.repos[f"alice/{name}"] = Repo(f"alice/{name}", True)
    hub.repos[f"alice/{name}"].add("initial commit", {})
    message = client.value(PUSH, tiny_run, '{"private": false}')["error"]
    assert f"alice/{name}: the repository exists and is private" in message
    assert f"`hf repos settings alice/{name} --public`" in message and "without --public" in message
    assert list(hub.repos) == [f"alice/{name}"]
    assert len(hub.repos[f"alice/{name}"].commits) == 1


def test_private_push_refuses_a_public_repository_before_any_upload(
    hub: LocalHub, client: Client, tiny_run: Path
) -> None:
    hub.repos["alice/tiny-cpu-ppo"] = Repo("alice/tiny-cpu-ppo", False)
    hub.repos["alice/tiny-cpu-ppo"].add("initial commit", {})
    message = client.value(PUSH, tiny_run, "{}")["error"]
    assert "exists and is public" in message and "`hf repos settings alice/tiny-cpu-ppo --private`" in message
    assert list(hub.repos) == ["alice/tiny-cpu-ppo"]


def test_a_later_push_of_one_stage_keeps_its_links(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    pushed = client.value(PUSH, tiny_run, "{}")
    for stage in ("sft", "reward", "ppo-ptx"):
        card, stored = (hub.text(pushed[stage], name) for name in ("README.md", "stage.json"))
        commits = len(hub.repos[pushed[stage]].commits)
        client.value(PUSH, tiny_run, f'{{"stages": ["{stage}"]}}')
        assert hub.text(pushed[stage], "README.md") == card
        assert hub.text(pushed[stage], "stage.json") == stored
        assert len(hub.repos[pushed[stage]].commits) == commits


def test_stages_pushed_one_by_one_link_to_the_earlier_ones(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    client.value(PUSH, tiny_run, '{"stages": ["sft"]}')
    assert "tiny-cpu-reward" not in hub.text("alice/tiny-cpu-sft", "README.md")
    client.value(PUSH, tiny_run, '{"stages": ["reward"]}')
    assert "huggingface.co/alice/tiny-cpu-sft" in hub.text("alice/tiny-cpu-reward", "README.md")


def test_only_what_may_be_named_is_linked(hub: LocalHub, client: Client, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("sft", "reward"):
        shutil.copytree(tiny_run / stage, run / stage)
    client.value(PUSH, run, '{"stages": ["sft"]}')
    # A public card names no private repository.
    client.value(PUSH, run, '{"stages": ["reward"], "private": false}')
    assert "alice/tiny-cpu-sft" not in hub.text("alice/tiny-cpu-reward", "README.md")
    hub.repos["alice/tiny-cpu-sft"].private = False
    client.value(PUSH, run, '{"stages": ["reward"], "private": false}')
    assert "alice/tiny-cpu-sft" in hub.text("alice/tiny-cpu-reward", "README.md")
    # The repository of the SFT stage holds another training of it.
    record("sft", run, fingerprint="another").save(run / "sft")
    record("reward", run, previous={"sft": {"source": "sft", "fingerprint": "another"}}).save(run / "reward")
    client.value(PUSH, run, '{"stages": ["reward"], "private": false}')
    assert "alice/tiny-cpu-sft" not in hub.text("alice/tiny-cpu-reward", "README.md")


@pytest.mark.parametrize(
    ("recipe", "nearest"),
    [
        ("my recipe", "my-recipe"),
        ("Überblick", "Uberblick"),
        ("a--b..c", "a-b.c"),
        ("-draft-", "draft"),
        ("x" * 120, "x" * 92),
        ("日本", "run"),
        ("lr=1e-5,beta", "lr-1e-5-beta"),
    ],
)
def test_a_recipe_whose_name_is_no_repository_name(run_copy: Path, recipe: str, nearest: str) -> None:
    record("sft", run_copy, recipe=recipe).save(run_copy / "sft")
    with pytest.raises(InstructGPTError) as raised:
        push_run(run_copy, None)
    assert f"is {nearest!r}" in str(raised.value)
    assert f"--prefix {nearest}" in str(raised.value)


def test_the_nearest_name_is_accepted(hub: LocalHub, client: Client, run_copy: Path) -> None:
    record("sft", run_copy, recipe="my recipe").save(run_copy / "sft")
    assert "'my-recipe'" in client.value(PUSH, run_copy, "{}")["error"]
    assert hub.calls == []
    assert client.value(PUSH, run_copy, '{"prefix": "my-recipe"}') == {"sft": "alice/my-recipe-sft"}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_name_that_the_hub_refuses_is_found_out_before_training(tmp_path: Path, stage: str) -> None:
    copied = copy_recipe("tiny-cpu", tmp_path / "my recipe")
    recipe = load_recipe(copied, [f"--{stage}.push_to_hub", "true"])
    with pytest.raises(InstructGPTError) as raised:
        pipeline.run(recipe, tmp_path / "out")
    name = f"my recipe-{'ppo-ptx-value' if stage == 'ppo' else stage}"
    assert f"{name!r}: the Hub accepts no repository of this name" in str(raised.value)
    assert "is 'my-recipe'" in str(raised.value)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_prefix_of_the_command(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    code = "import sys; from instructgpt_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    process = client.run(code, "push", tiny_run, "--stages", "sft", "--prefix", "mine")
    assert process.returncode == 0, process.stderr
    assert list(hub.repos) == ["alice/mine-sft"]
