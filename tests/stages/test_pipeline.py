"""The tiny-cpu recipe through the pipeline with a handful of steps: what is written, skipped, redone and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers.metrics import find_metric
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from instructgpt_hf import pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.fit import Interrupted, StopAtCheckpoint

FEW_STEPS = [
    *("--sft.max_steps", "4"),
    *("--reward.max_steps", "4"),
    *("--ppo.generation_batch_size", "16"),
    *("--ppo.per_device_train_batch_size", "8"),
    *("--ppo.total_episodes", "32"),
    *("--ppo.save_steps", "2"),
    *("--ppo.eval_num_prompts", "10"),
    *("--per_device_eval_batch_size", "64"),
]


def recipe(*overrides):
    return load_recipe("tiny-cpu", [*FEW_STEPS, *overrides])


def screen():
    return Console(record=True, width=200, file=open(os.devnull, "w"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    console = screen()
    rows = pipeline.run(recipe(), folder, console)
    (folder / "screen.txt").write_text(console.export_text(), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps([row.name for row in rows]), encoding="utf-8")
    return folder


def test_a_run_leaves_models_records_report_and_pictures(run_folder):
    assert json.loads((run_folder / "rows.json").read_text()) == ["base", "SFT", "PPO", "PPO-ptx"]
    for stage in ("sft", "reward", "ppo", "ppo-ptx"):
        artifact = StageArtifact.load(run_folder / stage)
        assert artifact.stage == stage
        assert artifact.model["license"] == "apache-2.0"
        AutoTokenizer.from_pretrained(run_folder / stage)
    for stage in ("sft", "ppo", "ppo-ptx", "ppo/ema"):
        AutoModelForCausalLM.from_pretrained(run_folder / stage)
    for stage in ("reward", "ppo/value_model", "ppo-ptx/value_model"):
        AutoModelForSequenceClassification.from_pretrained(run_folder / stage, num_labels=1)
    for name in ("report.json", "report.md", "training_curves.png", "policies.png", "samples.jsonl"):
        assert (run_folder / "evaluation" / name).stat().st_size > 0
    assert not (run_folder / ".work").exists()
    assert not [path.name for path in run_folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_screen_shows_table_and_next_step(run_folder):
    text = (run_folder / "screen.txt").read_text(encoding="utf-8")
    assert "win rate" in text and "PPO-ptx" in text and "KL to SFT" in text
    assert "instructgpt-hf push" in text


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "ppo-ptx"])
def test_every_metric_that_a_trainer_logs_is_registered(run_folder, stage):
    artifact = StageArtifact.load(run_folder / stage)
    names = {name for record in artifact.training["log"] for name in record} | set(artifact.metrics)
    assert len(names) > 10
    assert not {name for name in names if find_metric(name, stage) is None}


def test_evaluation_reaches_the_records_of_the_policies(run_folder):
    metrics = StageArtifact.load(run_folder / "ppo-ptx").metrics
    report = json.loads((run_folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    row = next(item for item in report["policies"] if item["name"] == "PPO-ptx")
    assert metrics["win_rate_vs_sft"] == pytest.approx(row["win_rate"]["value"])
    assert metrics["judge"] == "the lab's gold labeler"


def test_scores_are_centred_on_the_demonstrations(run_folder):
    from instructgpt_hf import load_reward_model
    from instructgpt_hf.data.prompts import PromptFormat
    from instructgpt_hf.models.scoring import score_token_lists

    sft = StageArtifact.load(run_folder / "sft")
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "reward")
    rendered = PromptFormat.from_dict(sft.prompt_format)
    lines = (run_folder / "data" / "demonstrations.train.jsonl").read_text(encoding="utf-8").splitlines()[:2000]
    rows = [json.loads(line) for line in lines]
    ids = [
        rendered.prompt_ids(row["prompt"], tokenizer)
        + rendered.completion_ids(row["prompt"], row["completion"], tokenizer)
        for row in rows
    ]
    model = load_reward_model(run_folder / "reward")
    scores = score_token_lists(model, ids, tokenizer.pad_token_id, 128)
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-3)
    assert model.config.reward_shift == StageArtifact.load(run_folder / "reward").model["reward_shift"] != 0.0


def test_the_log_names_every_phase(run_folder):
    text = (run_folder / "log.txt").read_text(encoding="utf-8")
    phases = ["finding models, reading data", "tokenizing", "loading models", "training", "measuring held-back rows"]
    phases += ["centring scores on demonstrations", "saving", "measuring PPO: sampling completions"]
    phases += [f"measuring PPO-ptx: {what}" for what in ("scoring them", "KL to SFT", "tasks", "loss on pretraining")]
    assert not [phase for phase in phases if f"  {phase}" not in text]
    # Results too, as on standard output.
    assert "held-back accuracy" in text and "PPO-ptx minus PPO" in text


def test_a_second_run_skips_what_is_unchanged(run_folder):
    before = {path: path.stat().st_mtime_ns for path in run_folder.glob("*/model.safetensors")}
    console = screen()
    pipeline.run(recipe(), run_folder, console)
    assert console.export_text().count("already finished and unchanged, skipped") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_changed_stage_is_redone_with_all_that_depends_on_it(run_folder):
    console = screen()
    changed = recipe("--reward.learning_rate", "1e-4")
    for stage in ("sft", "reward"):
        pipeline.run_stage(changed, stage, run_folder, console)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr("instructgpt_hf.stages.stage.train", lambda *_, **__: seen.append("ppo") or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run_stage(changed, "ppo", run_folder, console)
    text = console.export_text()
    assert text.count("already finished and unchanged, skipped") == 1  # the SFT stage
    assert "reward  finished before, but its settings, data or earlier stages have changed" in text
    assert seen == ["ppo"]
    pipeline.run_stage(recipe(), "reward", run_folder, screen())  # as it was, for the tests after this one


@pytest.mark.parametrize(("stage", "step"), [("sft", 2), ("ppo", 1)])
def test_an_interrupted_stage_resumes_where_it_stopped(run_folder, tmp_path, monkeypatch, stage, step):
    settings = recipe("--ppo.compare_without_ptx", "false", "--ppo.eval_num_prompts", "4")
    if stage == "ppo":
        for name in ("sft", "reward", "data"):
            os.symlink(run_folder / name, tmp_path / name)
    original = StopAtCheckpoint.on_step_end

    def press_ctrl_c(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopAtCheckpoint, "on_step_end", press_ctrl_c)
        with pytest.raises(Interrupted):
            pipeline.run_stage(settings, stage, tmp_path, screen())
    name = "ppo-ptx" if stage == "ppo" else stage
    assert not (tmp_path / name).exists()
    assert list((tmp_path / ".work" / name).glob("checkpoint-*"))
    console = screen()
    pipeline.run_stage(settings, stage, tmp_path, console)
    assert "resuming the interrupted stage from step 2" in console.export_text()
    resumed = StageArtifact.load(tmp_path / name)
    if stage == "ppo":
        whole = StageArtifact.load(run_folder / name)
        first, second = (Path(folder) / name / "model.safetensors" for folder in (run_folder, tmp_path))
        assert first.read_bytes() == second.read_bytes()
        assert whole.training["steps"] == resumed.training["steps"]


def test_stages_take_a_path_as_the_previous_stage(run_folder, tmp_path):
    settings = recipe("--reward.sft_model_path", str(run_folder / "sft"), "--center_num_demonstrations", "5")
    folder, console = tmp_path / "run[x=1]", screen()
    (artifact,) = pipeline.run_stage(settings, "reward", folder, console)
    assert f"--output_dir {folder}`" in console.export_text()  # as it is, not as rich's markup
    assert artifact.metrics["demonstrations_scored"] == 5
    assert artifact.previous["sft"]["fingerprint"] == StageArtifact.load(run_folder / "sft").fingerprint


def test_plain_ppo_is_ptx_coef_zero(run_folder, tmp_path):
    for name in ("sft", "reward", "data"):
        os.symlink(run_folder / name, tmp_path / name)
    settings = recipe("--ppo.ptx_coef", "0", "--ppo.compare_without_ptx", "false")
    (artifact,) = pipeline.run_stage(settings, "ppo", tmp_path, screen(), part_of_run=True)
    assert artifact.stage == "ppo" and not (tmp_path / "ppo-ptx").exists()
    first, second = (folder / "ppo" / "model.safetensors" for folder in (run_folder, tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_a_failing_stage_leaves_nothing_half_written(run_folder, tmp_path, monkeypatch):
    for name in ("sft", "data"):
        os.symlink(run_folder / name, tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr("instructgpt_hf.stages.stage.train", lambda *_: (_ for _ in ()).throw(InstructGPTError("no")))
        with pytest.raises(InstructGPTError):
            pipeline.run_stage(recipe(), "reward", tmp_path, screen())
    assert sorted(item.name for item in tmp_path.iterdir()) == [".work", "data", "log.txt", "sft"]
