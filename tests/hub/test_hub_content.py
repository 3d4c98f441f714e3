"""What a push sends for every kind of stage, and what it leaves behind: nothing derived row by row is sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_client import Client
from helpers.local_hub import LocalHub
from helpers.tiny_run import record, tiny_config, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.bundle import VALUE_FOLDER, Bundle, prepare
from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model

PUSH = """
    import json, sys
    from rich.console import Console
    from instructgpt_hf.hub.publish import push_run
    push_run(sys.argv[1], None, private="--public" not in sys.argv, console=Console())
"""
ROLLOUT = '{"prompt": "a secret prompt", "completion": "a secret completion"}\n'
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FULL = {"config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
PUBLISHED = {"README.md", "stage.json"}
SFT = {*FULL, *TOKENIZER, *PUBLISHED, "generation_config.json"}
REWARD = {*FULL, *TOKENIZER, *PUBLISHED, "evaluation.json", "evaluation.png"}
PPO = {*SFT, "ema/config.json", "ema/generation_config.json", "ema/model.safetensors"}
VALUE = {*FULL, *TOKENIZER, *PUBLISHED}
EXPECTED = {
    "tiny-cpu-sft": SFT,
    "tiny-cpu-reward": REWARD,
    "tiny-cpu-ppo": PPO,
    "tiny-cpu-ppo-value": VALUE,
    "tiny-cpu-ppo-ptx": PPO,
    "tiny-cpu-ppo-ptx-value": VALUE,
}
EXPECTED_ADAPTERS = {
    "tiny-cpu-sft": {*ADAPTER, *TOKENIZER, *PUBLISHED},
    "tiny-cpu-reward": {*ADAPTER, *TOKENIZER, *PUBLISHED, "classifier/config.json", "evaluation.json"},
    "tiny-cpu-ppo": {*ADAPTER, *TOKENIZER, *PUBLISHED, *(f"ema/{name}" for name in ADAPTER)},
    "tiny-cpu-ppo-value": {*ADAPTER, *TOKENIZER, *PUBLISHED, "classifier/config.json"},
}
# What lies in a stage's folder beside its model: rows, and what is derived from them row by row.
ROWS = (
    *("rollouts.jsonl", "scores.csv", "predictions.json", "train.parquet", "samples.txt", "hidden.safetensors"),
    *("evaluation_rows.json", "data/rows.jsonl", "runs/events.out.tfevents.1.my-host", ".cache/rows.json"),
)


def write_rows(folder: Path) -> None:
    for name in ROWS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(ROLLOUT)


def write_adapters(run: Path) -> Path:
    """A run with LoRA in all stages: SFT, reward and PPO, as the stages write them."""
    tokenizer, lora = tiny_tokenizer(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config())
    base.save_pretrained(run / "base")
    tokenizer.save_pretrained(run / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(run / "base"), lora)
    scorer = create_reward_model(
        run / "base", tokenizer, seed=0, peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    for stage in ("sft", "reward", "ppo"):
        folder = run / stage
        if stage == "reward":
            save_reward_model(scorer, folder)
            (folder / "evaluation.json").write_text("{}\n")
        else:
            policy.save_pretrained(folder)
        if stage == "ppo":
            policy.save_pretrained(folder / "ema")
            save_reward_model(scorer, folder / VALUE_FOLDER)
            tokenizer.save_pretrained(folder / VALUE_FOLDER)
        tokenizer.save_pretrained(folder)
        record(stage, run, model={"kind": "adapter"}).save(folder)
    return run


def remote_files(hub: LocalHub) -> dict[str, set[str]]:
    return {
        repo_id.removeprefix("alice/"): set(repo.at("main").files) - {".gitattributes"}
        for repo_id, repo in hub.repos.items()
    }


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("visibility", ["--private", "--public"])
def test_exactly_what_goes(
    hub: LocalHub, client: Client, tiny_run: Path, tmp_path: Path, kind: str, visibility: str
) -> None:
    run = tmp_path / "run"
    if kind == "full":
        shutil.copytree(tiny_run, run)
    else:
        write_adapters(run)
    folders = [path.parent for path in run.glob("*/stage.json")]
    for folder in [*folders, *run.glob(f"*/{VALUE_FOLDER}"), *run.glob("*/ema")]:
        write_rows(folder)
    process = client.run(PUSH, run, visibility)
    assert process.returncode == 0, process.stdout + process.stderr
    assert remote_files(hub) == (EXPECTED if kind == "full" else EXPECTED_ADAPTERS)
    assert not any(b"secret" in file.data for repo in hub.repos.values() for file in repo.at("main").files.values())
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("not sent: ")]
    named = line.removeprefix("not sent: ").split(", ")
    assert len(named) == len(set(named))
    for name in (
        "ppo/rollouts.jsonl",
        "ppo/ema/rollouts.jsonl",
        "ppo/value_model/rollouts.jsonl",
        "sft/data/",
        "sft/runs/",
    ):
        assert name in named


def test_nothing_is_said_where_all_goes(hub: LocalHub, client: Client, tiny_run: Path) -> None:
    assert "not sent" not in client.run(PUSH, tiny_run).stdout


def test_published_rollouts_are_deleted_by_the_next_push(hub: LocalHub, client: Client, run_copy: Path) -> None:
    client.run(PUSH, run_copy)
    repo = hub.repos["alice/tiny-cpu-sft"]
    stored = next(iter(repo.at("main").files.values()))
    repo.add("an earlier version's push", {**repo.at("main").files, "rollouts.jsonl": stored, "NOTES.md": stored})
    client.run(PUSH, run_copy)
    assert set(repo.at("main").files) - {".gitattributes"} == {*SFT, "NOTES.md"}


def sent(folder: Path, stage: str = "sft") -> Bundle:
    return prepare(folder, record(stage), {})


def test_every_vocabulary_of_transformers_goes(run_copy: Path) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    names: set[str] = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            names |= set(getattr(transformers, TOKENIZER_MAPPING_NAMES[kind]).vocab_files_names.values())
        except (KeyError, TypeError, ImportError, AttributeError):
            continue  # no tokenizer of its own, or one that needs a library that is not installed
    assert {"vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.json", "tokenizer.model"} <= names
    for name in names - TOKENIZER:
        (run_copy / "sft" / name).write_text("{}")
    assert names <= set(sent(run_copy / "sft").files)


def _bpe(folder: Path, kind: str) -> Any:
    import transformers

    return getattr(transformers, kind)(vocab={"<unk>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])


@pytest.mark.parametrize(
    "kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CTRLTokenizer", "ByT5Tokenizer"]
)
def test_all_that_tokenizers_write_goes(run_copy: Path, tmp_path: Path, kind: str) -> None:
    import transformers

    if kind == "CTRLTokenizer":
        (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
        tokenizer = transformers.CTRLTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    else:
        tokenizer = transformers.ByT5Tokenizer() if kind == "ByT5Tokenizer" else _bpe(tmp_path, kind)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(run_copy / "sft")
    tokenizer.save_pretrained(run_copy / "sft", save_jinja_files=False)
    bundle = sent(run_copy / "sft")
    assert bundle.not_sent == []
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= set(bundle.files)


def test_shards_with_their_index_go(run_copy: Path) -> None:
    folder = run_copy / "sft"
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    bundle = sent(folder)
    assert bundle.not_sent == []
    weights = {path.name for path in folder.glob("model*")}
    assert len(weights) > 2 and "model.safetensors.index.json" in weights
    assert weights <= set(bundle.files)


def test_a_models_own_code_goes_and_no_other_code(run_copy: Path) -> None:
    folder = run_copy / "sft"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "my_config.C", "AutoModelForCausalLM": "my_model.M", "AutoModel": "a/b--far.M"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "my_model.py").write_text("from .my_layers import Layer\nfrom .absent import x\n")
    for name in ("my_config.py", "my_layers.py", "rewards.py", "far.py"):
        (folder / name).write_text("")
    bundle = sent(folder)
    assert {name for name in bundle.files if name.endswith(".py")} == {"my_config.py", "my_layers.py", "my_model.py"}
    assert bundle.not_sent == ["far.py", "rewards.py"]


def test_files_of_another_stage_stay(run_copy: Path) -> None:
    folder = run_copy / "sft"
    for name in ("evaluation.json", "classifier/config.json", "ema/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert sent(folder).not_sent == ["classifier/", "ema/", "evaluation.json"]


def test_other_safetensors_are_no_weights(run_copy: Path) -> None:
    (run_copy / "sft" / "model.safetensors").rename(run_copy / "sft" / "hidden.safetensors")
    with pytest.raises(InstructGPTError, match="no weights"):
        sent(run_copy / "sft")


def test_the_last_weights_go_where_the_average_is_published(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run / "ppo", tmp_path / "ppo")
    (folder / "ema").rename(folder / "raw")
    bundle = sent(folder, "ppo")
    assert bundle.not_sent == []
    assert {"raw/config.json", "raw/generation_config.json", "raw/model.safetensors"} <= set(bundle.files)
