"""The picture of a reward model's evaluation, also of rankings that leave panels nearly empty."""

import json
import random

import matplotlib
import pytest

from instructgpt_hf.evaluation import evaluate_rankings
from instructgpt_hf.evaluation.plots.reward_model import draw_rankings
from instructgpt_hf.evaluation.plots.training_curves import draw_training_curves


def typical():
    rng = random.Random(0)
    sizes = [rng.choice([2, 4, 9]) for _ in range(40)]
    ranks = [[rng.randint(1, 5) for _ in range(size)] for size in sizes]
    scores = [[rng.gauss(-rank, 1.0) for rank in row] for row in ranks]
    return scores, ranks, [[rng.randint(1, 90) for _ in row] for row in ranks]


CASES = {
    "typical": typical(),
    "one pair": ([[1.0, 0.0]], [[1, 2]], [[3, 3]]),
    "pairs": ([[1.0, 0.0], [0.0, 0.4]], [[1, 2], [1, 2]], [[3, 4], [9, 2]]),
    "equal scores": ([[0.0] * 3] * 3, [[1, 2, 2], [1, 1, 1], [1, 2, 3]], [[5, 4, 3]] * 3),
    "perfect": ([[3.0, 2.0, 1.0]] * 9, [[1, 2, 3]] * 9, [[5, 4, 3]] * 9),
    "all wrong": ([[1.0, 2.0, 3.0]] * 9, [[1, 2, 3]] * 9, [[5, 4, 3]] * 9),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error")
def test_pictures(tmp_path, name):
    before = dict(matplotlib.rcParams)
    result = evaluate_rankings(*CASES[name])
    path = draw_rankings(json.loads(json.dumps(result)), tmp_path / "evaluation.png")
    assert path == tmp_path / "evaluation.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000
    assert dict(matplotlib.rcParams) == before


def test_training_curves_show_held_out_accuracy_beside_length_alone(tmp_path, monkeypatch):
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    log = [{"step": step, "accuracy": 0.5} for step in range(9)]
    ends = {"eval_accuracy_low": 0.4, "eval_accuracy_high": 0.7}
    log += [{"step": step, "eval_accuracy": 0.6, "eval_length_baseline_accuracy": 0.55, **ends} for step in (4, 8)]
    draw_training_curves({"reward": log}, tmp_path / "curves.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["held out"] == [[4.0, 0.6], [8.0, 0.6]]
    assert lines["length alone"] == [[4.0, 0.55], [8.0, 0.55]]
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == {
        (4, 0.4),
        (8, 0.4),
        (4, 0.7),
        (8, 0.7),
    }
