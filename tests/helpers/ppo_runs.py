"""PPO stages of tiny random models, each in a folder of its own behind the same first two stages."""

import io
import os

from rich.console import Console

from helpers.stage_files import write_model, write_recipe, write_rows
from instructgpt_hf import pipeline
from instructgpt_hf.config.recipe import load_recipe

ROWS = [{"prompt": f"a w{index % 35}", "completion": "b c", "rejected": "d"} for index in range(40)]


def screen():
    return Console(record=True, width=300, file=io.StringIO())


def ppo_runs(root, tokenizer, **changes):
    """A function that runs a PPO stage of 6 iterations of 2 steps with more options, in a folder of `root`.

    It returns the run's folder, the stage's record and what was logged.
    """
    model, data = write_model(root / "model", tokenizer), write_rows(root / "rows.jsonl", ROWS)
    rankings = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["rejected"]} for row in ROWS]
    common = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    own = dict(generation_batch_size=16, total_episodes=96, max_completion_length=6, ptx_coef=0, save_steps=2)
    stages = {
        "sft": dict(model_name_or_path=str(model), dataset_name=data, prompt_template="raw", max_steps=1, **common),
        "reward": dict(dataset_name=write_rows(root / "rankings.jsonl", rankings), max_steps=1, **common),
        "ppo": dict(dataset_name=data, **own, **common, **changes),
    }
    recipe = str(write_recipe(root / "recipe", stages))
    for stage in ("sft", "reward"):
        pipeline.run_stage(load_recipe(recipe), stage, root / "run", screen(), part_of_run=True)

    def run(name, *words):
        target = root / name
        target.mkdir(exist_ok=True)
        for stage in ("sft", "reward"):
            if not (target / stage).exists():
                os.symlink(root / "run" / stage, target / stage)
        console = screen()
        (artifact,) = pipeline.run_stage(load_recipe(recipe, list(words)), "ppo", target, console, part_of_run=True)
        return target, artifact, console.export_text()

    return run
