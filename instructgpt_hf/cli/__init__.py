"""The command `instructgpt-hf`: `command` is what all verbs share, the other modules have the verbs.

No module of this folder imports anything heavy at its top, so that `--help` is fast; actions do.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

from instructgpt_hf import __version__
from instructgpt_hf.cli import data, lab, merge, push, recipes, run
from instructgpt_hf.cli.command import Parser, Verbs
from instructgpt_hf.cli.encoding import settle_encoding
from instructgpt_hf.cli.interruption import lost_peer, resume_command, speaks, terminable
from instructgpt_hf.errors import InstructGPTError, first_line, full_disk

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """The parser of the whole command, without the settings of the recipes."""
    parser = Parser(
        prog="instructgpt-hf",
        description="InstructGPT on the Hugging Face stack: SFT, K-way reward model, PPO-ptx.",
        epilog="Start with: instructgpt-hf run tiny-cpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"instructgpt-hf {__version__}")
    verbs = Verbs(parser)
    for module in (run, recipes, push, data, merge, lab):  # the order of --help
        module.add(verbs)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    It is 0, 2 for a mistake of the user or a full disk, 130 after Ctrl-C, 143 after SIGTERM, and 1 where another
    training process has ended.
    """
    words = list(sys.argv[1:] if words is None else words)
    settle_encoding()
    try:
        with terminable():
            _run_verb(build_parser(), words)
    except InstructGPTError as error:
        _print_error(str(error))
        return 2
    except KeyboardInterrupt as stop:
        if speaks():
            _print(f"Interrupted. What is finished stays; the same command resumes: {resume_command(words)}")
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; closing stderr keeps Python from complaining at exit.
        sys.stderr.close()
    except Exception as error:
        if (text := full_disk(error, ".")) is not None:
            _print_error(f"{text}.")
            return 2
        if not lost_peer(error):
            raise
        if speaks():
            _print(
                f"Another training process has ended, perhaps killed for lack of memory ({first_line(error)}). The "
                f"same command resumes from the last checkpoint: {resume_command(words)}"
            )
        return 1
    return 0


def _run_verb(parser: Parser, words: list[str]) -> None:
    arguments, rest = parser.parse_known_args(words)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return
    if rest and not arguments.takes_settings:
        raise InstructGPTError(f"instructgpt-hf {arguments.verb}: unknown arguments: {' '.join(rest)}")
    arguments.settings = rest
    arguments.action(arguments)


def _print_error(message: str) -> None:
    """Print to stderr, in red on a terminal. Values from files may hold brackets, so no markup is interpreted.

    Several training processes usually fail for the same reason. The first one of a machine prints the message, and its
    launcher then ends the others; a process that still runs after a while has another message to print.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    _print(message)


def _print(message: str) -> None:
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}{message}{reset}", file=sys.stderr)
