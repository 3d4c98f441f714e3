"""The report's files, its table and its pictures; importing evaluation stays light."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from instructgpt_hf.evaluation import Estimate, PolicyRow, print_table, wilson, write_report

ROWS = [
    PolicyRow("base", win_rate=wilson(4, 40), task_accuracy=wilson(30, 40), mean_reward=-1.5),
    PolicyRow("SFT", wilson(20, 40), wilson(28, 40), Estimate(0.0, 0.0, 0.0), 0.01, 0.5, {"copy": wilson(9, 10)}),
    PolicyRow("PPO-ptx", wilson(31, 40), wilson(28, 40), Estimate(6.0, 5.0, 7.1), float("nan"), extra={"prompts": 40}),
]
CURVES = {
    "sft": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}, {"step": 2, "train_runtime": 1.0}],
    "reward": [{"step": step, "loss": 0.7, "accuracy": 0.5} for step in range(60)]
    + [{"step": 60, "eval_accuracy": 0.6}],
    "ppo": [{"iteration": 1, "objective/scores": 0.1, "objective/kl": float("nan")}],
    "ppo-ptx": [{"iteration": i, "objective/scores": i / 9, "objective/kl": i, "loss/ptx": 2.0} for i in range(1, 9)],
}


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_report_files(tmp_path):
    written = write_report(tmp_path / "evaluation", ROWS, CURVES, {"judge": "gold labeler", "prompts": 40})
    assert sorted(path.name for path in written) == ["policies.png", "report.json", "report.md", "training_curves.png"]
    assert all(path.is_file() for path in written)
    assert all(is_png(path) for path in written if path.suffix == ".png")
    report = json.loads((tmp_path / "evaluation/report.json").read_text(encoding="utf-8"))
    assert report["notes"] == {"judge": "gold labeler", "prompts": 40}
    assert [row["name"] for row in report["policies"]] == ["base", "SFT", "PPO-ptx"]
    assert report["policies"][0]["win_rate"]["value"] == 0.1
    assert report["policies"][0]["kl"] is None
    assert report["policies"][2]["mean_reward"] is None
    assert report["policies"][1]["task_accuracy_by_task"]["copy"]["value"] == 0.9
    text = (tmp_path / "evaluation/report.md").read_text(encoding="utf-8")
    assert "| SFT | 50.0 % (35.2 to 64.8) | 70.0 % (54.6 to 81.9) | 0.00 (0.00 to 0.00) | 0.01 | 0.50 |" in text
    assert "- judge: gold labeler" in text
    assert "nan" not in text
    assert "| copy | – | 90.0 % (59.6 to 98.2) | – |" in text
    for name in ("policies.png", "training_curves.png"):
        assert f"({name})" in text


def test_what_was_not_measured_is_left_out(tmp_path):
    rows = [PolicyRow("SFT", mean_reward=0.5), PolicyRow("PPO")]
    written = write_report(tmp_path, rows)
    assert [path.name for path in written] == ["report.json", "report.md"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| policy | mean reward |" in text
    assert "| PPO | – |" in text


@pytest.mark.parametrize("stages", [["sft"], ["ppo-ptx"], ["ppo", "ppo-ptx"], ["reward"]])
def test_curves_of_some_stages(tmp_path, stages):
    write_report(tmp_path, ROWS, {stage: CURVES[stage] for stage in stages})
    assert is_png(tmp_path / "training_curves.png")


def test_table_fits_80_columns(capsys):
    console = Console(width=80, record=True, force_terminal=False)
    print_table(ROWS, console, title="tiny-cpu")
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("tiny-cpu", "PPO-ptx", "77.5 %", "[62.5,87.7]", "[5.00,7.10]", "95 % interval"):
        assert part in text


def test_metrics_have_the_names_of_stage_json():
    metrics = ROWS[1].metrics()
    assert metrics["win_rate_vs_sft"] == 0.5
    assert metrics["win_rate_vs_sft_low"] == ROWS[1].win_rate.low
    assert metrics["task_accuracy_high"] == ROWS[1].task_accuracy.high
    assert (metrics["kl_to_sft"], metrics["mean_reward"], metrics["gold_score"]) == (0.0, 0.01, 0.5)
    assert "kl_to_sft" not in ROWS[0].metrics()


def test_drawing_changes_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(tmp_path, ROWS, CURVES)
    assert dict(matplotlib.rcParams) == before


def test_import_is_light():
    code = (
        "import sys, instructgpt_hf.evaluation as module; dir(module);"
        "print([name for name in ('torch', 'matplotlib', 'evaluate', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_resolves():
    import instructgpt_hf.evaluation as module

    assert all(callable(getattr(module, name)) for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
