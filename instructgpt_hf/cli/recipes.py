"""`instructgpt-hf recipes`: list, show or copy the shipped recipes."""

from __future__ import annotations

import argparse

from instructgpt_hf.cli.command import Verbs
from instructgpt_hf.cli.settings import in_yaml
from instructgpt_hf.errors import InstructGPTError, nearest


def add(verbs: Verbs) -> None:
    """Add the verb with its own verbs `list`, `show` and `copy`."""
    nested = Verbs(verbs.add("recipes", "list, show or copy recipes", "instructgpt-hf recipes list"), "recipes_verb")
    nested.add_nested("list", "names and what they are", "instructgpt-hf recipes list", _list)
    text = "print a recipe's README, or one of its files with the defaults it keeps"
    show = nested.add_nested("show", text, "instructgpt-hf recipes show tiny-cpu ppo.yaml", _show)
    show.add_argument("name", metavar="NAME")
    show.add_argument("file", metavar="FILE", nargs="?", default="README.md", help="README.md by default")
    copy = nested.add_nested("copy", "copy a recipe to edit it", "instructgpt-hf recipes copy tiny-cpu mine", _copy)
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("folder", metavar="DIR", help="must not exist, or be empty")


def _list(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.config.catalog import list_recipes

    recipes = list_recipes()
    width = max(len(name) for name, _, _ in recipes)
    for name, description, _ in recipes:
        print(f"{name:{width}}  {description}")


def _show(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.artifacts import STAGES
    from instructgpt_hf.config.catalog import recipe_folder
    from instructgpt_hf.config.recipe import load_recipe

    folder = recipe_folder(arguments.name)
    names = [item.name for item in sorted(folder.iterdir()) if item.suffix in (".yaml", ".md")]
    name = f"{arguments.file}.yaml" if arguments.file in STAGES else arguments.file
    if name not in names:
        raise InstructGPTError(f"{name}: recipe {arguments.name} has no such file; {nearest(name, names)}")
    print((folder / name).read_text(encoding="utf-8").rstrip())
    stage = name.removesuffix(".yaml")
    if stage not in STAGES:
        return
    # The settings that the file leaves at a default of this package, as YAML comments.
    settings = load_recipe(folder, stages=[stage]).stages[stage]
    print("\n# Left at the default, with its source")
    for key, (default, source) in settings.defaults_with_source().items():
        if key not in settings.values:
            print(f"# {key}: {in_yaml(default)}  ({source})")


def _copy(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.config.catalog import copy_recipe

    folder = copy_recipe(arguments.name, arguments.folder)
    print(f"Copied to {folder}. Edit it, then: instructgpt-hf run {folder}")
