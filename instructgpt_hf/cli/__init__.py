"""The command `instructgpt-hf`: one module per verb, and `command` for what all verbs share.

No module of this folder imports anything heavy at its top, so that `--help` answers at once; actions do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instructgpt_hf.cli import data, lab, merge, push, recipes, run, stage
from instructgpt_hf.cli.command import Parser, Verbs, new_parser, run_command

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """The parser of the whole command, without the settings of the recipes."""
    parser = new_parser()
    verbs = Verbs(parser)
    for verb in (run, stage, recipes, push, data, merge, lab):  # the order of --help
        verb.add(verbs)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    return run_command(build_parser(), list(sys.argv[1:] if words is None else words))
