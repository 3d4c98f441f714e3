"""The command `instructgpt-hf`. Nothing heavy is imported before the verb is known, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from instructgpt_hf import __version__
from instructgpt_hf.errors import InstructGPTError, Problems, nearest

_SETTINGS = """\
Every key of the recipe's YAML files can be set here: --ppo.beta 0.05 for one stage, --seed 3 for every stage that has
the key, --key=value, --use_peft for true, several words for a list. The command line wins over the files."""

_STAGE_HELP = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "reward model from rankings",
    "ppo": "PPO, or PPO-ptx with pretraining gradients",
}


class _Parser(argparse.ArgumentParser):
    """Misuse of the command is one of our errors: a message that names the nearest valid word, exit code 2."""

    def error(self, message: str) -> Any:
        raise InstructGPTError(f"{message}\n{self.format_usage().strip()}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, without the settings of the recipes."""
    parser = _Parser(
        prog="instructgpt-hf",
        description="InstructGPT on the Hugging Face stack: SFT, K-way reward model, PPO-ptx.",
        epilog="Start with: instructgpt-hf run tiny-cpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"instructgpt-hf {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=_Parser)

    def verb(name: str, help: str, example: str, action: Callable[..., None], **more: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog="\n\n".join([*more.values(), f"Example:\n  {example}"]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(action=action)
        return made

    run = verb("run", "all stages of a recipe", "instructgpt-hf run tiny-cpu --ppo.beta 0.05", _run, notes=_SETTINGS)
    run.usage = "instructgpt-hf run RECIPE [--output_dir DIR] [--KEY VALUE ...]"
    run.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a folder with its files")
    _add_output_dir(run, "runs/<recipe>")
    for stage, text in _STAGE_HELP.items():
        example = f"instructgpt-hf {stage} --config tiny-cpu --seed 3"
        made = verb(stage, f"one stage: {text}", example, _stage, notes=_SETTINGS)
        made.usage = f"instructgpt-hf {stage} --config RECIPE [--output_dir DIR] [--KEY VALUE ...]"
        made.add_argument("--config", required=True, metavar="RECIPE", help="recipe, its folder, or the stage's YAML")
        _add_output_dir(made, "runs/<recipe>; this stage writes its own folder inside, and finds the earlier ones")
    _add_recipes(verb("recipes", "list, show or copy recipes", "instructgpt-hf recipes list", _print_help))
    _add_push(verb("push", "upload a run's stages to the Hub", "instructgpt-hf push runs/tiny-cpu", _push))
    _add_data(verb("data", "look at a dataset", "instructgpt-hf data inspect lab:rankings", _print_help))
    _add_merge(verb("merge", "make an adapter a whole model", "instructgpt-hf merge runs/mine/reward merged", _merge))
    lab = verb("lab", "write the generated data of the lab", "instructgpt-hf lab data --seed 0", _lab)
    lab.add_argument("folder", metavar="DIR", help="where the files go")
    lab.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    return parser


def _add_output_dir(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output_dir", metavar="DIR", help=f"folder of the run (default {default})")


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
    verbs = parser.add_subparsers(dest="recipes_verb", metavar="COMMAND", parser_class=_Parser)
    listing = verbs.add_parser("list", help="names and what they are", epilog="Example: instructgpt-hf recipes list")
    listing.set_defaults(action=_list_recipes)
    show = verbs.add_parser(
        "show",
        help="print a recipe's README, or one of its files with the defaults it keeps",
        epilog="Example: instructgpt-hf recipes show tiny-cpu ppo.yaml",
    )
    show.add_argument("name", metavar="NAME")
    show.add_argument("file", metavar="FILE", nargs="?", default="README.md", help="README.md by default")
    show.set_defaults(action=_show_recipe)
    copy = verbs.add_parser(
        "copy", help="copy a recipe to edit it", epilog="Example: instructgpt-hf recipes copy tiny-cpu mine"
    )
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("folder", metavar="DIR", help="must not exist, or be empty")
    copy.set_defaults(action=_copy_recipe)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
    verbs = parser.add_subparsers(dest="data_verb", metavar="COMMAND", parser_class=_Parser)
    inspect = verbs.add_parser(
        "inspect",
        help="what the reward stage will see of a dataset of rankings or pairs",
        epilog="Example: instructgpt-hf data inspect lab:rankings --tokenizer lab --prompt_template user-assistant",
        allow_abbrev=False,
    )
    inspect.set_defaults(action=_inspect)
    inspect.add_argument("dataset", metavar="DATASET", help="Hub id, local file or folder, or lab:rankings")
    inspect.add_argument("--dataset_config", metavar="NAME", help="configuration of a Hub dataset")
    inspect.add_argument("--split", default="train", metavar="NAME", help="split to read (default train)")
    inspect.add_argument("--tokenizer", metavar="MODEL", help="Hub id or folder (default: lengths in words)")
    inspect.add_argument("--prompt_template", metavar="NAME", help="as in sft.yaml (default chat, or the stage's)")
    inspect.add_argument("--max_length", type=_count, metavar="N", help="as in reward.yaml (default 2048)")
    inspect.add_argument("--max_prompt_length", type=_count, metavar="N", help="as in reward.yaml (default 1024)")
    inspect.add_argument("--limit", type=_count, metavar="N", help="read only the first N rows of the source")


def _count(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be 1 or greater")
    return number


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as runs/tiny-cpu")
    parser.add_argument("--hub_namespace", metavar="NAME", help="user or organization (default: the logged-in user)")
    parser.add_argument("--public", action="store_true", help="make the repositories public (default: private)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="which stages (default: every finished one)")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FOLDER", help="folder or Hub id of a stage that is an adapter")
    parser.add_argument("target", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides, output_dir=arguments.output_dir)
    from instructgpt_hf import pipeline

    pipeline.run(recipe, _output_dir(arguments, recipe))


def _stage(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf.config.recipe import load_recipe

    stage = arguments.verb
    recipe = load_recipe(arguments.config, overrides, stages=[stage], output_dir=arguments.output_dir)
    from instructgpt_hf import pipeline

    pipeline.run_stage(recipe, stage, _output_dir(arguments, recipe))


def _output_dir(arguments: argparse.Namespace, recipe: Any) -> Path:
    return Path(arguments.output_dir) if arguments.output_dir else Path("runs") / recipe.name


def _list_recipes(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf.config.catalog import list_recipes

    found = list_recipes()
    width = max(len(name) for name, _, _ in found)
    for name, description, _ in found:
        print(f"{name:{width}}  {description}")


def _show_recipe(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf.artifacts import STAGES
    from instructgpt_hf.config.catalog import recipe_folder

    folder = recipe_folder(arguments.name)
    names = [item.name for item in sorted(folder.iterdir()) if item.suffix in (".yaml", ".md")]
    name = f"{arguments.file}.yaml" if arguments.file in STAGES else arguments.file
    if name not in names:
        raise InstructGPTError(f"{name}: recipe {arguments.name} has no such file; {nearest(name, names)}")
    print((folder / name).read_text(encoding="utf-8").rstrip())
    stage = name.removesuffix(".yaml")
    if stage in STAGES:
        _print_defaults(folder, stage)


def _print_defaults(folder: Path, stage: str) -> None:
    """Print, as YAML comments, what the file of a stage leaves at a default that this package chose."""
    from instructgpt_hf.config.recipe import load_recipe

    settings = load_recipe(folder, stages=[stage]).stages[stage]
    print("\n# Left at the default, with its source")
    for key, (default, source) in settings.defaults_with_source().items():
        if key not in settings.values and default is not None:
            shown = str(default).lower() if isinstance(default, bool) else default
            print(f"# {key}: {shown}  ({source})")


def _copy_recipe(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf.config.catalog import copy_recipe

    folder = copy_recipe(arguments.name, arguments.folder)
    print(f"Copied to {folder}. Edit it, then: instructgpt-hf run {folder}")


def _push(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from instructgpt_hf.hub.publish import push_run

    push_run(
        Path(arguments.run),
        arguments.hub_namespace,
        private=not arguments.public,
        stages=arguments.stages,
        console=Console(),
    )


def _inspect(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from instructgpt_hf.stages.inspection import inspect_rankings, show

    summary = inspect_rankings(
        arguments.dataset,
        arguments.dataset_config,
        arguments.split,
        tokenizer=arguments.tokenizer,
        prompt_template=arguments.prompt_template,
        max_length=arguments.max_length,
        max_prompt_length=arguments.max_prompt_length,
        limit=arguments.limit,
    )
    show(summary, Console())


def _merge(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf._compat.quirks import quiet_environment
    from instructgpt_hf.models.merging import merge_adapter

    with quiet_environment():
        folder = merge_adapter(arguments.source, arguments.target, arguments.dtype)
    print(f"Merged {arguments.source} into {folder}")


def _lab(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from instructgpt_hf import lab

    folder = Path(arguments.folder)
    if folder.exists() and not folder.is_dir():
        raise InstructGPTError(f"{folder}: is a file; give a folder")
    try:
        paths = lab.write(folder, arguments.seed)
    except OSError as error:
        raise InstructGPTError(f"{folder}: cannot be written ({error.strerror})") from None
    print(f"Wrote {len(paths)} files to {folder}")


def _print_help(arguments: argparse.Namespace, overrides: list[str]) -> None:
    arguments.parser.print_help()


def _dispatch(words: Sequence[str]) -> None:
    parser = build_parser()
    if not words:
        parser.print_help()
        return
    arguments, rest = parser.parse_known_args(words)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return
    if rest and arguments.verb not in ("run", *_STAGE_HELP):
        problems = Problems(f"instructgpt-hf {arguments.verb}: unknown arguments:")
        for word in rest:
            problems.add(word)
        problems.raise_if_any()
    arguments.action(arguments, rest)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if words is None else words)
    try:
        _dispatch(given)
    except InstructGPTError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        again = " ".join(["instructgpt-hf", *given])
        _complain(f"Interrupted. What is finished stays; the same command resumes: {again}")
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; closing stderr keeps Python from complaining at exit.
        sys.stderr.close()
        return 0
    return 0


def _complain(message: str) -> None:
    """Print to stderr, in red on a terminal. Values from files may hold brackets, so no markup is interpreted.

    Several training processes usually make the same mistake. The first on a machine complains, and its launcher then
    ends the others; one that is still there after a while has something else to say.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}{message}{reset}", file=sys.stderr)
