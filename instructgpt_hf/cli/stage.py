"""`instructgpt-hf sft`, `reward` and `ppo`: one stage of a recipe."""

from __future__ import annotations

import argparse

from instructgpt_hf.cli.command import Verbs
from instructgpt_hf.cli.run import SETTINGS_NOTE, add_output_dir, run_folder

_HELP = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "reward model from rankings",
    "ppo": "PPO, or PPO-ptx with pretraining gradients",
}


def add(verbs: Verbs) -> None:
    """Add a verb for each stage."""
    for stage, text in _HELP.items():
        example = f"instructgpt-hf {stage} --config tiny-cpu --seed 3"
        parser = verbs.add(stage, f"one stage: {text}", example, _run_stage, notes=SETTINGS_NOTE, settings=True)
        parser.usage = f"instructgpt-hf {stage} --config RECIPE [--output_dir DIR] [--KEY VALUE ...]"
        parser.add_argument(
            "--config", required=True, metavar="RECIPE", help="recipe, its folder, or the stage's YAML"
        )
        add_output_dir(parser, "runs/<recipe>; this stage writes its own folder inside, and finds the earlier ones")


def _run_stage(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.config.recipe import load_recipe

    stage, output_dir = arguments.verb, arguments.output_dir
    recipe = load_recipe(arguments.config, arguments.settings, stages=[stage], output_dir=output_dir)
    from instructgpt_hf import pipeline  # imports torch: a wrong recipe is refused before

    pipeline.run_stage(recipe, stage, run_folder(output_dir, recipe.name))
