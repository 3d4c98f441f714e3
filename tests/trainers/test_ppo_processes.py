"""Two processes take the iterations of one with the same global batch: the same losses, metrics and weights."""

import json

import pytest
import torch
from helpers.ppo_step import is_clock
from safetensors.torch import load_file

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Measured on one micro-batch of one process.
LOCAL = ("grad_norm_ratio_ptx", "grad_cosine_ptx")
WEIGHTS = ("end", "average")


CASES = ("ppo-full", "ppo-lora", "ppo-ptx-full", "ppo-ptx-lora")


def found(folder):
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    return log["processes"], log["log"], {name: load_file(folder / f"{name}.safetensors") for name in WEIGHTS}


def test_two_processes_equal_one(ppo_source, run_helper):
    run_helper("ppo_step", ppo_source, ppo_source / "one", 4, 2)
    run_helper("ppo_step", ppo_source, ppo_source / "two", 2, 2, launcher=TORCHRUN)
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
        # Only completions that differ in length say anything about the sharing of tokens.
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
