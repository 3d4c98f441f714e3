"""Tiny PPO trainers, a Hub that notes what is asked, and the input of helpers that run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def make_trainer(tokenizer, make_policy, make_scorer, tmp_path):
    from helpers.ppo_trainer import build_trainer, count_c

    def build(folder="work", reward=count_c, policy=None, value_model=None, tokenizer=tokenizer, **changes):
        return build_trainer(
            policy if policy is not None else make_policy(),
            reward,
            value_model if value_model is not None else make_scorer(),
            tokenizer,
            **{"output_dir": tmp_path / folder, **changes},
        )

    return build


@pytest.fixture
def ppo_source(make_policy, make_scorer, tokenizer, tmp_path):
    """A folder with `policy`, `scorer` and `tokenizer`."""
    policy = make_policy()
    with torch.no_grad():
        policy.lm_head.weight[1] *= 4  # completions that end, after one token or several
    policy.save_pretrained(tmp_path / "policy")
    make_scorer().save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def run_helper():
    """A function that runs a module of tests/helpers in a process of its own and returns its output."""

    def run(module, *words, launcher=()):
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", f"helpers.{module}", *map(str, words)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


class Hub:
    """Notes what a trainer asks of the Hub."""

    def __init__(self):
        self.private, self.uploads = None, []

    def create_repo(self, name, token=None, private=None, exist_ok=False):
        self.private = private
        return type("Url", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, folder_path, ignore_patterns, **_):
        self.uploads.append((folder_path, ignore_patterns))


@pytest.fixture
def hub(monkeypatch):
    import transformers.trainer

    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: hub)
    return hub
