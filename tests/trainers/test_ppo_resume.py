"""A run that is killed at any point and started again ends as the run that was never interrupted, bit for bit."""

import json

import pytest


@pytest.fixture
def run(run_helper, ppo_source):
    """A function that runs with kills; returns the last checkpoint after each, and the folder of the end."""

    def build(name, lora, *kills):
        output = run_helper("interrupted_ppo", ppo_source, ppo_source / name, int(lora), *kills)
        words = [line.split() for line in output.splitlines() if line.startswith("killed ")]
        return {place: checkpoint for _, place, checkpoint in words}, ppo_source / name / "end"

    return build


def files(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def first_difference(log, other):
    for record, found in zip(log, other, strict=True):
        if record != found:
            return {key: (record.get(key), found.get(key)) for key in record if record.get(key) != found.get(key)}
    return None


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_runs_end_as_the_uninterrupted_one(run, lora):
    kills = {"rollout:2": "None", "optimizer-step:10": "checkpoint-8"}
    if not lora:
        kills = {
            # before there is a checkpoint, and while the first one is written
            "rollout:2": "None",
            "weights:1": "None",
            "random-numbers:1": "None",
            "state:1": "None",
            "rename:1": "None",
            "renamed:1": "checkpoint-8",
            # between checkpoints
            "optimizer-step:5": "checkpoint-8",
            # while the second one takes the place of the first
            "weights:2": "checkpoint-8",
            "rotation:1": "checkpoint-16",
            # in the middle of a step's accumulation
            "pretraining:11": "checkpoint-16",
        }
    last, resumed = run("resumed", lora, *kills)
    assert last == kills
    _, whole = run("whole", lora)
    names = [f"{part}{'adapter_' if lora else ''}model.safetensors" for part in ("", "value_model/", "ema/")]
    names.append("rollouts.jsonl")
    assert files(resumed, names) == files(whole, names)
    logs = [json.loads((folder / "log.json").read_text(encoding="utf-8")) for folder in (whole, resumed)]
    assert first_difference(*logs) is None
    assert len(logs[0]) == 10, "28 steps, logged every third, and the end"
