"""The stages and the Hub together: pushed by the recipe, and read back as the previous stage into an empty cache."""

from __future__ import annotations

STAGE = """
import json, sys
from pathlib import Path
from instructgpt_hf import pipeline
from instructgpt_hf.config.recipe import load_recipe

few = ["--max_steps", "2", "--seed", "0"]
ppo = ["--generation_batch_size", "16", "--per_device_train_batch_size", "8", "--total_episodes", "16",
       "--compare_without_ptx", "false", "--eval_num_prompts", "4", "--max_steps", "2"]

def stage(name, folder, *words):
    recipe = load_recipe("tiny-cpu", [*(ppo if name == "ppo" else few), *words], stages=[name])
    return pipeline.run_stage(recipe, name, folder, part_of_run="--push_to_hub" not in words)
"""


def test_stages_are_pushed_by_the_recipe_and_continue_from_the_hub(client, hub, tmp_path):
    process = client.run(
        STAGE
        + """
stage("sft", "first", "--push_to_hub", "true")
stage("reward", "first", "--push_to_hub", "true")
"""
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (tmp_path / "first").rename(tmp_path / "gone")  # what follows can only come from the Hub
    pushed = {}
    for stage in ("sft", "reward"):
        repo = hub.repos[f"alice/tiny-cpu-{stage}"]
        pushed[stage] = repo.commits[-1].sha
        repo.add("something else", {})  # only the revisions hold the stages
    found = client.value(
        STAGE
        + """
(artifact,) = stage("ppo", "second", "--sft_model_path", "alice/tiny-cpu-sft", "--sft_model_revision", sys.argv[1],
                    "--reward_model_path", "alice/tiny-cpu-reward", "--reward_model_revision", sys.argv[2])
print(json.dumps({"previous": artifact.previous, "stage": artifact.stage, "steps": artifact.training["steps"]}))
""",
        *pushed.values(),
    )
    assert found["stage"] == "ppo-ptx"
    assert found["steps"] == 2
    for stage, revision in pushed.items():
        item = found["previous"][stage]
        assert (item["source"], item["revision"], item["path"]) == (f"alice/tiny-cpu-{stage}", revision, None)
    assert {repo.private for repo in hub.repos.values()} == {True}
