"""`instructgpt-hf run`, `sft`, `reward` and `ppo`: all stages of a recipe, or one."""

from __future__ import annotations

import argparse

from instructgpt_hf.cli.command import Verbs, add_quiet, importing

_SETTINGS_NOTE = """\
Every key of the recipe's YAML files can be set here: --ppo.beta 0.05 for one
stage, --seed 3 for every stage that has the key, --key=value, --use_peft for
true, several words for a list; --max-steps is --max_steps. The command line wins
over the files. sft, reward and ppo --help list the settings.

"""
_CHECK = "only look at data, models and reward functions, and print what was found"
_STAGES = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "reward model from rankings",
    "ppo": "PPO, or PPO-ptx with pretraining gradients",
}


def add(verbs: Verbs) -> None:
    """Add the verb for all stages and one for each stage."""
    example = "instructgpt-hf run tiny-cpu --ppo.beta 0.05"
    run = verbs.add("run", "all stages of a recipe", example, _run, _SETTINGS_NOTE, settings=True)
    run.usage = "instructgpt-hf run RECIPE [--output_dir DIR] [--KEY VALUE ...]"
    run.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a folder with its files")
    run.add_argument("--output_dir", metavar="DIR", help="folder of the run (default runs/<recipe>)")
    add_quiet(run)
    run.add_argument("--check", action="store_true", help=_CHECK)
    default = "default runs/<recipe>; this stage writes its own folder inside, and finds the earlier ones"
    for stage, text in _STAGES.items():
        example = f"instructgpt-hf {stage} --config tiny-cpu --seed 3"
        parser = verbs.add(stage, f"one stage: {text}", example, _run, _SETTINGS_NOTE, settings=True)
        parser.usage = f"instructgpt-hf {stage} --config RECIPE [--output_dir DIR] [--KEY VALUE ...]"
        parser.set_defaults(stage_settings=stage)
        config = "recipe, its folder, or the stage's YAML"
        parser.add_argument("--config", dest="recipe", required=True, metavar="RECIPE", help=config)
        parser.add_argument("--output_dir", metavar="DIR", help=f"folder of the run ({default})")
        add_quiet(parser)
        parser.add_argument("--check", action="store_true", help=_CHECK)


def _run(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.config.recipe import load_recipe, run_folder

    verb, output_dir = arguments.verb, arguments.output_dir
    stages = [verb] if verb in _STAGES else _STAGES
    with importing(arguments.quiet):
        recipe = load_recipe(arguments.recipe, arguments.settings, stages, output_dir)
        from instructgpt_hf import pipeline  # imports torch: a wrong recipe is refused before

    folder = run_folder(recipe.name, output_dir or None)
    if arguments.check:
        pipeline.check(recipe, folder, quiet=arguments.quiet)
    elif verb in _STAGES:
        pipeline.run_stage(recipe, verb, folder, quiet=arguments.quiet)
    else:
        pipeline.run(recipe, folder, quiet=arguments.quiet)
