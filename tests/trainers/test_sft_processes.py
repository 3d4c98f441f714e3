"""Two processes evaluate what one does: means over tokens, and demonstrations that fill a batch count once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import sft_evaluation


def test_two_processes_equal_one(make_policy, tokenizer, tmp_path):
    make_policy().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def words(name, batch):
        (tmp_path / name).mkdir()
        return [*(str(tmp_path / folder) for folder in ("model", "tokenizer", name)), str(batch)]

    def result(name):
        return json.loads((tmp_path / name / "result.json").read_text())

    sft_evaluation.main(*words("one", 5))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run(
        [sys.executable, *torchrun, "-m", "helpers.sft_evaluation", *words("two", 2)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    one, two = result("one"), result("two")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
