"""Pushing to a Hub and loading from it again with plain transformers and an empty cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.hub_client import READ_TOKEN, TOKEN, Client
from helpers.local_hub import Fault, LocalHub, Repo
from helpers.tiny_run import PICTURE, SHIFT, record

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.publish import push_run, push_stage

PUSH = """
    import json, sys
    from rich.console import Console
    from instructgpt_hf.hub.publish import push_run
    print(json.dumps(push_run(sys.argv[1], None, console=Console())))
"""
PUSH_SFT = """
    import json, sys
    from instructgpt_hf.errors import InstructGPTError
    from instructgpt_hf.hub.publish import push_stage
    try:
        print(json.dumps(push_stage(sys.argv[1], sys.argv[2])))
    except InstructGPTError as error:
        print(json.dumps({"error": str(error)}))
"""
LOAD = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    ids = torch.tensor([[3, 5, 6, 7, 4, 9, 8, 1]])
    def read(kind, source):
        model = kind.from_pretrained(source).eval()
        with torch.no_grad():
            return model(input_ids=ids).logits.flatten().tolist(), getattr(model.config, "reward_shift", None)
    kinds = {"sft": AutoModelForCausalLM, "ppo-ptx": AutoModelForCausalLM}
    kinds |= {"reward": AutoModelForSequenceClassification, "ppo-ptx-value": AutoModelForSequenceClassification}
    sources = json.loads(sys.argv[1])
    print(json.dumps({name: read(kind, sources[name]) for name, kind in kinds.items()}))
"""


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_run_round_trip(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    pushed = client.value(PUSH, tiny_run)
    assert pushed == {
        name: f"alice/tiny-cpu-{name}" for name in ("sft", "reward", "ppo", "ppo-value", "ppo-ptx", "ppo-ptx-value")
    }
    for repo_id in pushed.values():
        repo = hub.repos[repo_id]
        assert repo.private
        assert repo.commits[0].title == "initial commit"
        assert len(repo.commits) == 2
        assert not any(name.startswith("value_model") for name in repo.at("main").files)
        for name, file in repo.at("main").files.items():
            assert b"bob" not in file.data, (repo_id, name)
            assert TOKEN.encode() not in file.data

    local = {name: tiny_run / name for name in ("sft", "reward", "ppo-ptx")}
    local["ppo-ptx-value"] = tiny_run / "ppo-ptx" / "value_model"
    expected = client.value(LOAD, json.dumps({name: str(path) for name, path in local.items()}))
    from_hub = client.value(LOAD, json.dumps(pushed))
    assert from_hub == expected
    assert from_hub["reward"][1] == SHIFT
    evaluation = hub.repos[pushed["reward"]].at("main").files
    assert evaluation["evaluation.png"].data == PICTURE
    assert evaluation["evaluation.json"].data == (tiny_run / "reward" / "evaluation.json").read_bytes()
    assert "](evaluation.png)" in hub.text(pushed["reward"], "README.md")

    policy = metadata(hub.text(pushed["ppo-ptx"], "README.md"))
    assert policy["base_model"] == pushed["sft"]
    assert metadata(hub.text(pushed["reward"], "README.md"))["base_model"] == pushed["sft"]
    assert "base_model" not in metadata(hub.text(pushed["sft"], "README.md"))
    stored = json.loads(hub.text(pushed["ppo-ptx"], "stage.json"))
    assert {name: item["source"] for name, item in stored["previous"].items()} == {
        "sft": pushed["sft"],
        "reward": pushed["reward"],
    }
    for name in ("sft", "reward", "ppo-ptx-value"):
        assert f"huggingface.co/{pushed[name]}" in hub.text(pushed["ppo-ptx"], "README.md")

    again = client.value(PUSH, tiny_run)
    assert again == pushed
    assert all(len(hub.repos[repo_id].commits) == 2 for repo_id in pushed.values())


def test_usage_examples_run_as_printed(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    pushed = client.value(PUSH, tiny_run)
    examples = [
        re.search(r"```python\n(.*?)```", hub.text(pushed[name], "README.md"), re.S)[1]
        for name in ("sft", "ppo-ptx-value", "reward")
    ]
    printed, reward = client.value(
        """
        import contextlib, io, json, sys, torch
        from transformers import AutoModelForSequenceClassification
        printed = []
        for example in json.loads(sys.argv[1]):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(example, {})
            printed.append(output.getvalue())
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[2]).eval()
        # "User: Write the prompt here." "Assistant:" "Write the answer here." <eos> in the tiny vocabulary
        ids = [3, 2, 6, 2, 2, 4, 2, 6, 2, 2, 1]
        print(json.dumps([printed, model(input_ids=torch.tensor([ids])).logits.item() - 0.375]))
        """,
        json.dumps(examples),
        tiny_run / "reward",
    )
    assert printed[1].startswith("tensor([")
    assert float(printed[2]) == pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/api/repos/create", 503),
        Fault("POST", "/api/validate-yaml", 429),
        Fault("POST", "/commit/", 503),
        Fault("POST", "/commit/", 0),  # committed, but the answer is lost
        Fault("GET", "/tree/", 503),
    ],
    ids=lambda fault: f"{fault.pattern.split('/')[-1] or 'commit'}-{fault.status}",
)
def test_one_failure_is_survived(hub: LocalHub, client: Client, tiny_run: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    url = client.value(PUSH_SFT, tiny_run / "sft", "alice/model")
    commits = hub.repos["alice/model"].commits
    assert fault.times == 0
    assert len(commits) == 2
    assert url.endswith(commits[-1].sha)


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        (None, "alice/model", "hf auth login"),
        ("hf_notAToken1234567890", "alice/model", "hf auth login"),
        (READ_TOKEN, "alice/model", "write access"),
        (TOKEN, "carol/model", "hf auth whoami"),
        (TOKEN, "alice/not a name", "alice/not a name"),
    ],
    ids=["no-token", "bad-token", "read-token", "other-namespace", "bad-name"],
)
def test_refusals_say_what_to_do(
    hub: LocalHub, client: Client, tiny_run: Path, token: str | None, repo_id: str, expected: str
) -> None:
    process = client.run(PUSH_SFT, tiny_run / "sft", repo_id, token=token)
    message = json.loads(process.stdout.splitlines()[-1])["error"]
    assert expected in message
    assert token is None or token not in process.stdout + process.stderr
    assert not hub.repos


def test_namespace_without_login_is_explained(client: Client, tiny_run: Path) -> None:
    process = client.run(PUSH, tiny_run, token=None)
    assert process.returncode != 0
    assert "hf auth login" in process.stderr


def test_another_persons_private_repository(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    hub.repos["carol/secret"] = Repo("carol/secret", True)
    process = client.run(PUSH_SFT, tiny_run / "sft", "carol/secret")
    assert "carol/secret" in json.loads(process.stdout.splitlines()[-1])["error"]


def test_private_push_refuses_a_public_repository(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    hub.repos["alice/open"] = Repo("alice/open", False)
    hub.repos["alice/open"].add("initial commit", {})
    process = client.run(PUSH_SFT, tiny_run / "sft", "alice/open")
    assert "is public" in json.loads(process.stdout.splitlines()[-1])["error"]
    assert len(hub.repos["alice/open"].commits) == 1


def test_public_on_request_and_stale_weights_are_replaced(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    code = """
        import json, sys
        from pathlib import Path
        from instructgpt_hf.hub.publish import push_stage
        folder = Path(sys.argv[1])
        push_stage(folder, "alice/model", private=False)
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        push_stage(folder, "alice/model", private=False, commit_message="Shards")
        print("{}")
    """
    shutil.copytree(tiny_run / "sft", client.folder / "sft")
    client.value(code, client.folder / "sft")
    repo = hub.repos["alice/model"]
    assert not repo.private
    assert [commit.title for commit in repo.commits[1:]] == ["Add the sft stage of tiny-cpu", "Shards"]
    assert [name for name in repo.at("main").files if name.endswith(".safetensors")] == [
        "model-00001-of-00001.safetensors"
    ]


def test_pickles_and_training_state_are_refused(run_copy: Path) -> None:
    stage = run_copy / "sft"
    (stage / "pytorch_model.bin").write_bytes(b"")
    (stage / "training_args.bin").write_bytes(b"")
    (stage / "checkpoint-10").mkdir()
    (stage / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InstructGPTError) as raised:
        push_run(run_copy, "alice")
    for name in ("pytorch_model.bin", "training_args.bin", "checkpoint-10"):
        assert name in str(raised.value)


def test_incomplete_folders_are_refused(run_copy: Path) -> None:
    (run_copy / "sft" / "model.safetensors").unlink()
    with pytest.raises(InstructGPTError, match="no weights"):
        push_stage(run_copy / "sft", "alice/model")
    (run_copy / "sft" / "stage.json").unlink()
    with pytest.raises(InstructGPTError, match="no finished stage"):
        push_run(run_copy, "alice")
    with pytest.raises(InstructGPTError, match=r"stage\.json"):
        push_stage(run_copy / "sft", "alice/model")


def test_stages_are_checked_together(run_copy: Path) -> None:
    with pytest.raises(InstructGPTError) as raised:
        push_run(run_copy, "alice", stages=["sft", "rewrad", "ppo"])
    assert "did you mean 'reward'" in str(raised.value)
    assert "'ppo' is not finished" in str(raised.value)


def test_adapter_of_a_local_base_leaves_no_path(hub: LocalHub, client: Client, run_copy: Path) -> None:
    stage = run_copy / "sft"
    (stage / "config.json").unlink()
    (stage / "model.safetensors").rename(stage / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "/home/bob/models/smol", "peft_type": "LORA", "r": 8}
    (stage / "adapter_config.json").write_text(json.dumps(config))
    base = {"id": "/home/bob/models/smol", "revision": None, "fingerprint": "base"}
    record("sft", base_model=base, model={"kind": "adapter"}).save(stage)
    client.value(PUSH_SFT, stage, "alice/adapter")
    assert json.loads(hub.text("alice/adapter", "adapter_config.json"))["base_model_name_or_path"] == "./smol"
    card = hub.text("alice/adapter", "README.md")
    assert "bob" not in card
    assert "put it at `./smol`" in card
    assert metadata(card)["library_name"] == "peft"
    assert "base_model" not in metadata(card)


def test_adapters_name_the_stage_they_were_trained_on(hub: LocalHub, client: Client, run_copy: Path) -> None:
    policy = shutil.copytree(run_copy / "sft", run_copy / "ppo")
    (policy / "model.safetensors").rename(policy / "adapter_model.safetensors")
    config = {"base_model_name_or_path": str(run_copy / "sft"), "peft_type": "LORA"}
    (policy / "adapter_config.json").write_text(json.dumps(config))
    record("ppo", model={"kind": "adapter"}).save(policy)
    client.value(PUSH, run_copy)
    stored = json.loads(hub.text("alice/tiny-cpu-ppo", "adapter_config.json"))
    assert stored["base_model_name_or_path"] == "alice/tiny-cpu-sft"
    assert metadata(hub.text("alice/tiny-cpu-ppo", "README.md"))["base_model"] == "alice/tiny-cpu-sft"


def test_a_stage_trained_again_is_not_linked_to_what_came_from_the_old_one(
    hub: LocalHub, client: Client, tiny_run: Path
) -> None:
    run = client.folder / "run"
    for stage in ("sft", "reward"):
        shutil.copytree(tiny_run / stage, run / stage)
    record("sft", fingerprint="another").save(run / "sft")
    client.value(PUSH, run)
    assert json.loads(hub.text("alice/tiny-cpu-reward", "stage.json"))["previous"]["sft"]["source"] == "./sft"
    assert "base_model" not in metadata(hub.text("alice/tiny-cpu-reward", "README.md"))
    assert "tiny-cpu-reward" not in hub.text("alice/tiny-cpu-sft", "README.md").replace("alice/tiny-cpu-sft", "")
