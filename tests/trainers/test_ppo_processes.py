"""Two processes take the iterations of one with the same global batch: the same losses, metrics and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.ppo_step import is_clock
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "helpers" / "ppo_step.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Measured on one micro-batch of one process.
LOCAL = ("grad_norm_ratio_ptx", "grad_cosine_ptx")
WEIGHTS = ("end", "average")


CASES = ("ppo-full", "ppo-lora", "ppo-ptx-full", "ppo-ptx-lora")


def run(source, name, launcher, per_device, accumulation):
    words = [str(SCRIPT), str(source), str(source / name), str(per_device), str(accumulation)]
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def found(folder):
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    return log["processes"], log["log"], {name: load_file(folder / f"{name}.safetensors") for name in WEIGHTS}


def test_two_processes_equal_one(ppo_source):
    run(ppo_source, "one", [], 4, 2)
    run(ppo_source, "two", TORCHRUN, 2, 2)
    for case in CASES:
        processes, log, weights = found(ppo_source / "one" / case)
        others, other_log, other_weights = found(ppo_source / "two" / case)
        assert (processes, others) == (1, 2)
        assert len(log) == len(other_log) == 5, "four iterations and the end"
        for record, other in zip(log, other_log, strict=True):
            names = [name for name in record if name not in LOCAL and not is_clock(name)]
            assert {name: other[name] for name in names} == pytest.approx(
                {name: record[name] for name in names}, rel=1e-3, abs=1e-5
            ), case
        # Only answers that differ in length say anything about the sharing of tokens.
        assert log[0]["completions/min_length"] < log[0]["completions/max_length"], case
        for kind in WEIGHTS:
            for name, item in weights[kind].items():
                torch.testing.assert_close(
                    other_weights[kind][name],
                    item,
                    rtol=1e-3,
                    atol=1e-5,
                    msg=lambda text, name=name, case=case: f"{case}: {name}: {text}",
                )
