"""Where metrics go besides the log: TensorBoard's files, runs of trackers, the table of answers."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from helpers.stage_files import write_model, write_recipe, write_rows
from rich.console import Console

from instructgpt_hf import pipeline
from instructgpt_hf.config import rules
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError

ROWS = [{"prompt": f"a w{index % 35}", "completion": "b c"} for index in range(40)]


@pytest.fixture
def run_stages(tokenizer, tmp_path):
    """A function that runs all stages of tiny random models with one more setting."""
    rankings = [{"prompt": row["prompt"], "chosen": "b c", "rejected": "d"} for row in ROWS]
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    common = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    model = str(write_model(tmp_path / "model", tokenizer))
    ppo = dict(generation_batch_size=16, total_episodes=32, max_completion_length=6, ptx_coef=0, log_completions=True)
    recipe = write_recipe(
        tmp_path / "recipe",
        {
            "sft": dict(model_name_or_path=model, dataset_name=data, prompt_template="raw", max_steps=1, **common),
            "reward": dict(dataset_name=write_rows(tmp_path / "rankings.jsonl", rankings), max_steps=1, **common),
            "ppo": dict(dataset_name=data, **ppo, **common),
        },
    )

    def run(*overrides):
        settings = load_recipe(str(recipe), list(overrides))
        for stage in ("sft", "reward", "ppo"):
            pipeline.run_stage(settings, stage, tmp_path / "run", Console(quiet=True), part_of_run=True)
        return tmp_path / "run"

    return run


def test_tensorboard_files_outlive_the_stage_and_hold_its_metrics(run_stages):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_stages("--report_to", "tensorboard")
    assert sorted(item.name for item in (folder / "tensorboard").iterdir()) == ["ppo", "reward", "sft"]
    events = EventAccumulator(str(folder / "tensorboard" / "ppo"))
    events.Reload()
    wanted = {"objective/kl", "val/explained_variance", "throughput/generate", "completions/eos_rate", "loss/policy"}
    assert {f"train/{name}" for name in wanted} <= set(events.Tags()["scalars"])
    assert [item.step for item in events.Scalars("train/objective/kl")] == [2, 4]


def test_table_of_answers_is_printed_where_no_tracker_is_installed(run_stages, capsys):
    run_stages()
    text = capsys.readouterr().out
    assert text.count("Step 2") == 1 and "Completion" in text and "Advantage" in text and "reward_model" in text


@pytest.mark.parametrize(
    ("report_to", "rule"),
    [
        ("tensorboard", "needs the package tensorboard: pip install tensorboard"),
        (["none", "wandb"], "needs the package wandb: pip install wandb"),
        ("none", None),
        (None, None),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, report_to, rule):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    found = [item.rule for item in rules.violations("ppo", {"report_to": report_to})]
    assert found == ([rule] if rule else [])


def test_a_recipe_names_the_file_of_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None if name == "trackio" else find_spec(name))
    with pytest.raises(InstructGPTError, match=r"report_to.*trackio.*needs the package trackio"):
        load_recipe("tiny-cpu", ["--ppo.report_to", "trackio"])
