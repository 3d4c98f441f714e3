"""Two processes take the steps of one: the same losses, metrics and weights, whatever the split of a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "reward_step.py"
METRICS = ("loss", "accuracy", "margin", "mean_reward", "std_reward", "min_reward", "max_reward", "grad_norm")


@pytest.fixture
def runs(make_scorer, tmp_path):
    """One process, and two with half of the prompts each, started by torchrun with gloo."""
    folder = tmp_path
    make_scorer().save_pretrained(folder / "model")

    def run(name, launcher, batch, accumulation, tokenizer):
        (folder / name).mkdir()
        tokenizer.save_pretrained(folder / "tokenizer")
        words = [str(SCRIPT), str(folder / "model"), str(folder / "tokenizer"), str(folder / name)]
        done = subprocess.run(
            [sys.executable, *launcher, *words, str(batch), str(accumulation)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / name / "log.json").read_text()), load_file(folder / name / "end.safetensors")

    return run


def test_two_processes_equal_one(runs, tokenizer):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one, weights = runs("one", [], 8, 1, tokenizer)
    two, others = runs("two", torchrun, 2, 2, tokenizer)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["log"]) == len(two["log"]) == 3
    for record, other in zip(one["log"], two["log"], strict=True):
        assert {name: other[name] for name in METRICS} == pytest.approx(
            {name: record[name] for name in METRICS}, rel=1e-3, abs=1e-5
        )
    for name, item in weights.items():
        torch.testing.assert_close(others[name], item, rtol=1e-3, atol=1e-5)
    # Seven prompts on two processes in batches of three: the repeated ones do not count twice.
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward", "eval_prompts"):
        assert two["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=1e-3), name
    assert two["evaluation"]["eval_prompts"] == 7
