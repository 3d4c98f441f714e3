"""What all verbs of the command share: parser, dispatch, exit codes and error messages."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from instructgpt_hf import __version__
from instructgpt_hf.errors import InstructGPTError, Problems

Action = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InstructGPTError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise InstructGPTError(f"{message}\n{self.format_usage().strip()}")


def new_parser() -> Parser:
    """The parser of the command, without its verbs."""
    parser = Parser(
        prog="instructgpt-hf",
        description="InstructGPT on the Hugging Face stack: SFT, K-way reward model, PPO-ptx.",
        epilog="Start with: instructgpt-hf run tiny-cpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"instructgpt-hf {__version__}")
    return parser


class Verbs:
    """The verbs of the command, or of a verb such as `recipes` that has its own.

    Args:
        parser: parser that the verbs are added to.
        dest: argument that holds the verb.
    """

    def __init__(self, parser: Parser, dest: str = "verb") -> None:
        self._parsers = parser.add_subparsers(dest=dest, metavar="COMMAND", parser_class=Parser)

    def add(
        self, name: str, help: str, example: str, action: Action | None = None, notes: str = "", settings: bool = False
    ) -> Parser:
        """Add a verb of the command.

        Args:
            name: the verb.
            help: what it does, in lower case and without a full stop.
            example: a command line.
            action: called with the parsed arguments; without one, the verb prints its help.
            notes: paragraph in front of the example.
            settings: whether the settings of a recipe may follow; they are put into `arguments.settings`.
        """
        parser: Parser = self._parsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"{notes}\n\nExample:\n  {example}" if notes else f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(action=action or (lambda arguments: parser.print_help()), takes_settings=settings)
        return parser

    def add_nested(self, name: str, help: str, example: str, action: Action, **more: Any) -> Parser:
        """Add a verb of a verb, such as `list` of `recipes`."""
        parser: Parser = self._parsers.add_parser(name, help=help, epilog=f"Example: {example}", **more)
        parser.set_defaults(action=action)
        return parser


def run_command(parser: Parser, words: list[str]) -> int:
    """Parse the words of the command line, run the action of their verb and return the exit code."""
    try:
        _dispatch(parser, words)
    except InstructGPTError as error:
        _print_error(str(error))
        return 2
    except KeyboardInterrupt:
        again = " ".join(["instructgpt-hf", *words])
        _print_error(f"Interrupted. What is finished stays; the same command resumes: {again}")
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; closing stderr keeps Python from complaining at exit.
        sys.stderr.close()
    return 0


def _dispatch(parser: Parser, words: list[str]) -> None:
    arguments, rest = parser.parse_known_args(words)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return
    if rest and not arguments.takes_settings:
        problems = Problems(f"instructgpt-hf {arguments.verb}: unknown arguments:")
        for word in rest:
            problems.add(word)
        problems.raise_if_any()
    arguments.settings = rest
    arguments.action(arguments)


def _print_error(message: str) -> None:
    """Print to stderr, in red on a terminal. Values from files may hold brackets, so no markup is interpreted.

    Several training processes usually fail for the same reason. The first one of a machine prints the message, and its
    launcher then ends the others; a process that still runs after a while has another message to print.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}{message}{reset}", file=sys.stderr)
