"""`instructgpt-hf ppo` as a process that is killed and run again, and as two processes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
from helpers.stage_files import write_model, write_recipe, write_rows

from instructgpt_hf import pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.lifecycle import check_launch

COMMON = {
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
}
STAGES = {
    "sft": {"prompt_template": "raw", "max_length": 32, "max_steps": 1, "per_device_train_batch_size": 4},
    "reward": {"max_length": 32, "max_steps": 1, "per_device_train_batch_size": 4},
    "ppo": {
        "ptx_coef": 1.0,
        "ptx_episodes_ratio": 1,
        "ptx_max_length": 8,
        "pretraining_streaming": True,
        "per_device_train_batch_size": 4,
        "generation_batch_size": 8,
        "max_completion_length": 4,
        "total_episodes": 160,
        "save_steps": 2,
        "value_learning_rate": 1e-2,
        "eval_num_prompts": 2,
    },
}
DATA = {
    "sft": [{"prompt": f"a b {word}", "completion": f"{word} d"} for word in "efghijklmn"],
    "reward": [
        {"prompt": f"a {word}", "completions": ["c", f"d {word}", "e f g"], "ranks": [2, 1, 3]}
        for word in "efghijklmn"
    ],
    "ppo": [{"prompt": f"{word} b w{index}"} for word in "efghijklmnopqrst" for index in range(2)],
    "text": [{"text": f"{word} a b w{index}"} for word in "efghijklmnopqrst" for index in range(30)],
}
CLOCK = re.compile("^time/|^throughput/|_time$|_runtime$|_per_second$")
FILES = ("model.safetensors", "value_model/model.safetensors", "ema/model.safetensors", "rollouts.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer):
    """A recipe, and in `run/` its first two stages."""
    root = tmp_path_factory.mktemp("command")
    write_model(root / "base", tokenizer)
    for name, rows in DATA.items():
        write_rows(root / f"{name}.jsonl", rows)
    own = {
        "sft": {"model_name_or_path": f"{root}/base"},
        "reward": {},
        "ppo": {"pretraining_dataset_name": f"{root}/text.jsonl"},
    }
    stages = {
        stage: {**COMMON, **values, **own[stage], "dataset_name": f"{root}/{stage}.jsonl"}
        for stage, values in STAGES.items()
    }
    recipe = load_recipe(write_recipe(root / "recipe", stages))
    for stage in ("sft", "reward"):
        pipeline.run_stage(recipe, stage, root / "run")
    return root


def start(root, folder, launcher=(), more=()):
    """The command in a process group of its own, on a copy of the first two stages."""
    if not folder.exists():
        shutil.copytree(root / "run", folder)
    words = ["ppo", "--config", str(root / "recipe"), "--output_dir", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "instructgpt_hf.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """What a run that succeeds prints: results, then progress."""
    results, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return results + errors


def test_a_killed_stage_that_is_run_again_equals_the_uninterrupted_one(root, tmp_path):
    killed = tmp_path / "killed"
    process = start(root, killed)
    deadline = time.monotonic() + 200
    while not list(killed.glob(".work/ppo-ptx/checkpoint-*")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "ppo-ptx").exists()
    # As if it had been killed while it wrote the finished stage.
    (killed / ".ppo-ptx.killed").mkdir()
    assert "resuming the interrupted stage from step" in finish(start(root, killed))
    assert not list(killed.glob(".ppo-ptx*")) and not (killed / ".work").exists()

    finish(start(root, tmp_path / "whole"))
    first, second = (folder / "ppo-ptx" for folder in (tmp_path / "whole", killed))
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    logs = [StageArtifact.load(folder).training["log"] for folder in (first, second)]
    logs = [[{k: v for k, v in record.items() if not CLOCK.search(k)} for record in log] for log in logs]
    assert logs[0] == logs[1] and len(logs[0]) == 21


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_a_killed_process_of_several_is_said_with_the_command_that_resumes(root, tmp_path):
    """As where the kernel kills one for lack of memory; the launcher then ends the others."""
    folder, more = tmp_path / "lost", ["--per_device_train_batch_size", "2"]
    process = start(root, folder, TORCHRUN, more)
    deadline = time.monotonic() + 200
    while not list(folder.glob(".work/ppo-ptx/checkpoint-*")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = {int(child.environ()["LOCAL_RANK"]): child for child in psutil.Process(process.pid).children()}
    ranks[1].kill()
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    words = shlex.join(["python", *TORCHRUN, "-m", "instructgpt_hf.cli", "ppo", "--config", str(root / "recipe")])
    assert errors.count(f"resumes from the last checkpoint: {words}") + errors.count(f"resumes: {words}") == 1, errors
    assert "Traceback" not in errors.split("ChildFailedError")[0].split("torch/distributed")[0], errors


def test_two_processes_write_one_stage(root, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--per_device_train_batch_size", "2", "--total_episodes", "16", "--save_steps", "2"]
    printed = finish(start(root, tmp_path / "two", torchrun, more))
    assert printed.count("last iteration: score") == 1
    stage = StageArtifact.load(tmp_path / "two" / "ppo-ptx")
    assert stage.hardware["processes"] == 2
    assert stage.training["steps"] == 4
    assert all((tmp_path / "two" / "ppo-ptx" / name).is_file() for name in FILES)
    assert json.loads((tmp_path / "two" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "two" / ".work").exists()


@pytest.mark.parametrize(
    ("stage", "processes", "found", "message"),
    [
        ("sft", 1, {}, "2 processes were launched, but without GPUs each would train for itself. Add --use_cpu"),
        ("ppo", 2, {"fsdp": "full_shard"}, "FSDP splits the weights over the processes, and the ppo stage needs them"),
        ("reward", 2, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "DeepSpeed ZeRO-3 splits the weights"),
        ("sft", 2, {"fsdp": "full_shard"}, None),
        ("ppo", 2, {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, None),
    ],
)
def test_launches_that_a_stage_cannot_do_with_are_refused(monkeypatch, stage, processes, found, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = SimpleNamespace(**{"world_size": processes, "fsdp": None, "deepspeed_plugin": None, **found})
    with pytest.raises(InstructGPTError, match=message) if message else nullcontext():
        check_launch(args, stage)
