"""`instructgpt-hf run`: all stages of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from instructgpt_hf.cli.command import Parser, Verbs

SETTINGS_NOTE = """\
Every key of the recipe's YAML files can be set here: --ppo.beta 0.05 for one stage, --seed 3 for every stage that has
the key, --key=value, --use_peft for true, several words for a list. The command line wins over the files."""


def add(verbs: Verbs) -> None:
    """Add the verb."""
    example = "instructgpt-hf run tiny-cpu --ppo.beta 0.05"
    parser = verbs.add("run", "all stages of a recipe", example, _run, notes=SETTINGS_NOTE, settings=True)
    parser.usage = "instructgpt-hf run RECIPE [--output_dir DIR] [--KEY VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a folder with its files")
    add_output_dir(parser, "runs/<recipe>")


def add_output_dir(parser: Parser, default: str) -> None:
    """Add the argument `--output_dir`."""
    parser.add_argument("--output_dir", metavar="DIR", help=f"folder of the run (default {default})")


def run_folder(output_dir: str | None, recipe_name: str) -> Path:
    """Folder of the run: `--output_dir`, or `runs/<recipe>`."""
    return Path(output_dir) if output_dir else Path("runs") / recipe_name


def _run(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.settings, output_dir=arguments.output_dir)
    from instructgpt_hf import pipeline  # imports torch: a wrong recipe is refused before

    pipeline.run(recipe, run_folder(arguments.output_dir, recipe.name))
