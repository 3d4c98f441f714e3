"""Two processes take the steps of one: the same losses, metrics and weights, whatever the split of a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import reward_step
from safetensors.torch import load_file

METRICS = ("loss", "accuracy", "margin", "mean_reward", "std_reward", "min_reward", "max_reward", "grad_norm")


@pytest.fixture
def runs(make_scorer, tokenizer, tmp_path):
    """The same steps by two processes with half of the prompts each, started by torchrun with gloo, and by one."""
    make_scorer().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def words(name, batch, accumulation):
        (tmp_path / name).mkdir()
        folders = [str(tmp_path / folder) for folder in ("model", "tokenizer", name)]
        return [*folders, str(batch), str(accumulation)]

    def results(name):
        return json.loads((tmp_path / name / "log.json").read_text()), load_file(tmp_path / name / "end.safetensors")

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "helpers.reward_step", *words("two", 2, 2)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        reward_step.main(*words("one", 8, 1))
        output, _ = two.communicate(timeout=300)
    finally:
        two.terminate()  # torchrun ends its processes with it
    assert two.returncode == 0, output[-3000:]
    return results("one"), results("two")


def test_two_processes_equal_one(runs):
    (one, weights), (two, others) = runs
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
