"""`instructgpt-hf data inspect`: what the reward stage will see of a dataset."""

from __future__ import annotations

import argparse

from instructgpt_hf.cli.command import Verbs, add_quiet


def add(verbs: Verbs) -> None:
    """Add the verb with its own verb `inspect`."""
    example = "instructgpt-hf data inspect lab:rankings"
    nested = Verbs(verbs.add("data", "look at a dataset", example), "data_verb")
    text = "what the reward stage will see of a dataset of rankings or pairs"
    example += " --tokenizer lab --prompt_template user-assistant"
    inspect = nested.add_nested("inspect", text, example, _inspect)
    inspect.add_argument("dataset", metavar="DATASET", help="Hub id, local file or folder, or lab:rankings")
    inspect.add_argument("--dataset_config", metavar="NAME", help="configuration of a Hub dataset")
    inspect.add_argument("--split", default="train", metavar="NAME", help="split to read (default train)")
    inspect.add_argument("--tokenizer", metavar="MODEL", help="Hub id, folder or lab (default: lengths in words)")
    inspect.add_argument("--prompt_template", metavar="NAME", help="as in sft.yaml (default chat, or the stage's)")
    inspect.add_argument("--max_length", type=_count, metavar="N", help="as in reward.yaml (default 2048)")
    inspect.add_argument("--max_prompt_length", type=_count, metavar="N", help="as in reward.yaml (default 1024)")
    inspect.add_argument("--limit", type=_count, metavar="N", help="read only the first N rows of the source")
    add_quiet(inspect)


def _count(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be 1 or greater")
    return number


def _inspect(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.cli.ranking_tables import show
    from instructgpt_hf.stages.inspection import inspect_rankings
    from instructgpt_hf.stages.output import Output, Phase

    optional = ("tokenizer", "prompt_template", "max_length", "max_prompt_length", "limit")
    options = {name: getattr(arguments, name) for name in optional}
    with Output(quiet=arguments.quiet) as output:
        with output.phase(Phase(f"reading {arguments.dataset}")):
            summary = inspect_rankings(arguments.dataset, arguments.dataset_config, arguments.split, **options)
        show(summary, output.results)
