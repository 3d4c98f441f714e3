"""The picture of PPO's training: a panel for each quantity that was logged, each policy with its own points."""

import matplotlib
import pytest

from instructgpt_hf.evaluation.plots.training_curves import draw_training_curves

LOGGED = {
    "Reward of the answers": "objective/scores",
    "KL to the SFT model": "objective/kl",
    "Entropy of the policy": "objective/entropy",
    "Value model: explained variance": "val/explained_variance",
    "Clipped tokens": "policy/clip_fraction",
    "Pretraining loss": "loss/ptx",
    "Pretraining gradient": "grad_norm_ratio_ptx",
    "Length of the answers": "completions/mean_length",
    "Answers that end": "completions/eos_rate",
}


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """A function that draws curves and returns, by panel, the points of each line of its legend."""
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )

    def draw(curves):
        draw_training_curves(curves, tmp_path / "curves.png")
        return {
            axes.get_title(loc="left") or axes.get_title(): {
                line.get_label(): line.get_xydata().tolist()
                for line in axes.lines
                if not line.get_label().startswith("_")
            }
            for axes in drawn[-1].axes
        }

    return draw


@pytest.mark.filterwarnings("error")
def test_both_policies_in_every_panel_they_logged(panels):
    plain = [{"iteration": n, "step": 8 * n, **{key: 0.1 * n for key in LOGGED.values()}} for n in (1, 2, 3)]
    plain = [{key: value for key, value in record.items() if "ptx" not in key} for record in plain]
    both = [{"iteration": n, "step": 8 * n, **{key: 0.2 * n for key in LOGGED.values()}} for n in (1, 2, 3)]
    result = panels({"ppo": plain, "ppo-ptx": [*both, {"train_loss": 1.0, "step": 24}]})
    assert list(result) == list(LOGGED)
    for title, key in LOGGED.items():
        expected = {"PPO-ptx": [[n, pytest.approx(0.2 * n)] for n in (1.0, 2.0, 3.0)]}
        if "ptx" not in key:
            expected["PPO"] = [[n, pytest.approx(0.1 * n)] for n in (1.0, 2.0, 3.0)]
        assert result[title] == expected


@pytest.mark.filterwarnings("error")
def test_iterations_that_train_the_value_model_alone_leave_gaps(panels):
    log = [{"iteration": n, "objective/scores": 0.0, **({"loss/ptx": 1.0} if n > 2 else {})} for n in (1, 2, 3, 4)]
    assert panels({"ppo-ptx": log})["Pretraining loss"] == {"PPO-ptx": [[3.0, 1.0], [4.0, 1.0]]}
