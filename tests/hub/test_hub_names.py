"""Repositories of a run: their names, their visibility, and links to stages pushed earlier."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.hub_client import Client
from helpers.local_hub import LocalHub, Repo
from helpers.tiny_run import record

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
    assert "public in its settings" in message and "without --public" in message
    assert list(hub.repos) == [f"alice/{name}"]
    assert len(hub.repos[f"alice/{name}"].commits) == 1


def test_private_push_refuses_a_public_repository_before_any_upload(
    hub: LocalHub, client: Client, tiny_run: Path
) -> None:
    hub.repos["alice/tiny-cpu-ppo"] = Repo("alice/tiny-cpu-ppo", False)
    hub.repos["alice/tiny-cpu-ppo"].add("initial commit", {})
    assert "exists and is public" in client.value(PUSH, tiny_run, "{}")["error"]
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
    assert f"prefix={nearest!r}" in str(raised.value)


def test_the_nearest_name_is_accepted(hub: LocalHub, client: Client, run_copy: Path) -> None:
    record("sft", run_copy, recipe="my recipe").save(run_copy / "sft")
    assert "'my-recipe'" in client.value(PUSH, run_copy, "{}")["error"]
    assert hub.calls == []
    assert client.value(PUSH, run_copy, '{"prefix": "my-recipe"}') == {"sft": "alice/my-recipe-sft"}
