"""`instructgpt-hf merge`: make an adapter a whole model."""

from __future__ import annotations

import argparse

from instructgpt_hf.cli.command import Verbs, add_quiet


def add(verbs: Verbs) -> None:
    """Add the verb."""
    example = "instructgpt-hf merge runs/mine/reward merged"
    parser = verbs.add("merge", "make an adapter a whole model", example, _merge)
    parser.add_argument("source", metavar="FOLDER", help="folder or Hub id of a stage that is an adapter")
    parser.add_argument("target", metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16")
    add_quiet(parser)


def _merge(arguments: argparse.Namespace) -> None:
    from instructgpt_hf._compat.quirks import quiet_environment
    from instructgpt_hf.models.merging import merge_adapter
    from instructgpt_hf.stages.output import Output, Phase

    with Output(quiet=arguments.quiet) as output, quiet_environment():
        with output.phase(Phase(f"merging {arguments.source}", bar=False)):
            folder = merge_adapter(arguments.source, arguments.target, arguments.dtype)
        output.result(f"Merged {arguments.source} into {folder}")
