"""A PPO stage that was stopped: what is on disk, and how the next run goes on with changed settings."""

from __future__ import annotations

import json

import pytest
from helpers.ppo_runs import ppo_runs

from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.errors import InstructGPTError


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    """A function that runs a PPO stage; a stop's message takes the place of the record."""
    root = tmp_path_factory.mktemp("stopped")
    ppo = ppo_runs(root, tokenizer, learning_rate=5e-2, warmup_iterations=1, beta=0.0)

    def run(name, *words):
        try:
            return ppo(name, *words)
        except InstructGPTError as error:
            return root / name, str(error), ""

    return run


def test_a_stopped_stage_goes_on_from_its_last_good_checkpoint_with_changed_settings(prepared):
    _, free, _ = prepared("free")
    kl = [record["objective/kl"] for record in free.training["log"] if "objective/kl" in record]
    limit = (kl[1] + kl[2]) / 2
    assert kl[0] < kl[1] < limit < kl[2], "the KL must grow for this test to say anything"
    folder, text, _ = prepared("limited", "--stop_kl", str(limit))
    checkpoint = folder / ".work" / "ppo" / "checkpoint-2"
    assert "Training stopped in iteration 3" in text and str(checkpoint) in text
    assert "run the same command again" in text and "learning_rate" in text
    assert not (folder / "ppo").exists() and checkpoint.is_dir()

    _, artifact, said = prepared("limited", "--stop_kl", str(limit), "--learning_rate", "1e-4", "--beta", "0.5")
    assert "resuming the interrupted stage from step 2" in said
    assert artifact.training["changed_settings"] == [
        {"after_step": 2, "beta": [0.0, 0.5], "learning_rate": [0.05, 0.0001]}
    ]
    assert artifact.training["steps"] == 12
    log = [record for record in artifact.training["log"] if "objective/kl" in record]
    assert [record["learning_rate"] for record in log] == [0.05, *[0.0001] * 5]
    assert log[0] == {**log[0], **{key: value for key, value in free.training["log"][0].items() if "/kl" in key}}
    assert not (folder / ".work").exists()
    _, again, said = prepared("limited", "--learning_rate", "1e-4", "--beta", "0.5")
    assert "already finished and unchanged" in said and again.fingerprint == artifact.fingerprint
    lines = (folder / "ppo" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [number for number in range(1, 7) for _ in range(4)]
    assert "changed_settings" not in StageArtifact.load(folder.parent / "free" / "ppo").training


def test_going_on_from_an_earlier_checkpoint_forgets_changes_after_it(prepared):
    _, free, _ = prepared("free")
    kl = [record["objective/kl"] for record in free.training["log"] if "objective/kl" in record]
    limit, keep = str((kl[2] + kl[3]) / 2), ("--save_total_limit", "none")
    folder, text, _ = prepared("earlier", "--stop_kl", limit, *keep)
    assert "Training stopped in iteration 4" in text
    work = folder / ".work" / "ppo"
    assert sorted(item.name for item in work.glob("*-*")) == ["_stopped-6", "checkpoint-2", "checkpoint-4"]
    _, text, _ = prepared("earlier", "--stop_kl", limit, "--beta", "0.001", *keep)
    assert "Training stopped" in text, "from step 4 on, with a beta that is too small"
    words = ("--beta", "0.5", "--learning_rate", "1e-4", "--resume_from_checkpoint", str(work / "checkpoint-2"))
    _, artifact, said = prepared("earlier", *words, *keep)
    assert "from step 2" in said
    (change,) = artifact.training["changed_settings"]
    assert change == {"after_step": 2, "beta": [0.001, 0.5], "learning_rate": [0.05, 0.0001]}


def test_other_settings_than_those_start_over(prepared):
    _, free, _ = prepared("free")
    kl = [record["objective/kl"] for record in free.training["log"] if "objective/kl" in record]
    folder, text, _ = prepared("restarted", "--stop_kl", str((kl[1] + kl[2]) / 2))
    assert "Training stopped" in text
    _, artifact, said = prepared("restarted", "--learning_rate", "1e-4", "--seed", "3")
    assert "resuming" not in said
    assert "changed_settings" not in artifact.training
    assert [item.name for item in (folder / ".work").iterdir()] == ["ppo.1"], "set aside, not deleted"


def test_warnings_appear_on_the_screen(prepared, monkeypatch):
    monkeypatch.setattr("instructgpt_hf.trainers.ppo.watchdog.KL_WARNING", -1.0)
    _, _, said = prepared("warned", "--total_episodes", "32")
    assert said.count("warning: iteration 1: the KL to the starting policy") == 1
