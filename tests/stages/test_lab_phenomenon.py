"""What the lab is for, measured with the shipped recipe: PPO-ptx wins, plain PPO pays an alignment tax, ptx repays it.

Takes some ten minutes: `pytest -m slow tests/stages/test_lab_phenomenon.py`.
"""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from instructgpt_hf import pipeline
from instructgpt_hf.config.recipe import load_recipe


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_phenomena_of_the_paper_appear(tmp_path, seed):
    rows = {
        row.name: row
        for row in pipeline.run(load_recipe("tiny-cpu", ["--seed", str(seed)]), tmp_path / "run", Console(stderr=True))
    }
    notes = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text(encoding="utf-8"))["notes"]
    assert rows["PPO-ptx"].win_rate.low > 0.5
    assert interval(notes["task accuracy, PPO minus SFT"])[1] < 0, "plain PPO pays no alignment tax"
    assert interval(notes["task accuracy, PPO-ptx minus PPO"])[0] > 0, "the pretraining gradient keeps nothing"


def interval(text):
    """The bounds of "-6.0 points (-8.7 to -3.6)"."""
    low, high = text.split("(")[1].rstrip(")").split(" to ")
    return float(low), float(high)
