"""Parsers of the command: a mistake is an InstructGPTError, and every verb has a help text with an example."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from instructgpt_hf.errors import InstructGPTError

Action = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InstructGPTError instead of exiting; `--output-dir` is `--output_dir`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words; those that no verb knows stay as they are, apart from the dashes in names of options."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_underscores(word) for word in words], namespace)

    def format_help(self) -> str:
        """The help text, behind which a stage's verb lists its settings."""
        stage = self.get_default("stage_settings")
        if stage is None:
            return super().format_help()
        from instructgpt_hf.cli.settings import describe

        return f"{super().format_help()}\n{describe(stage)}"

    def error(self, message: str) -> NoReturn:
        raise InstructGPTError(f"{message}\n{self.format_usage().strip()}")


def _with_underscores(word: str) -> str:
    """`--output-dir=my-run` as `--output_dir=my-run`."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


@contextlib.contextmanager
def importing(quiet: bool) -> Iterator[None]:
    """Tell a terminal that the libraries are being imported, which takes seconds."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from instructgpt_hf.stages.output import Output, Phase

    with Output() as output, output.phase(Phase("loading libraries")):
        yield


def add_quiet(parser: Parser) -> None:
    """Add `--quiet` to a verb that takes a while."""
    parser.add_argument("--quiet", action="store_true", help="print results and errors only")


class Verbs:
    """The verbs of the command, or of a verb such as `recipes`; the argument `dest` holds the verb that was given."""

    def __init__(self, parser: Parser, dest: str = "verb") -> None:
        self._parsers = parser.add_subparsers(dest=dest, metavar="COMMAND", parser_class=Parser)

    def add(
        self, name: str, help: str, example: str, action: Action | None = None, notes: str = "", settings: bool = False
    ) -> Parser:
        """Add a verb of the command.

        Args:
            help: what the verb does, in lower case and without a full stop.
            action: called with the parsed arguments; without one, the verb prints its help.
            notes: paragraph in front of the example.
            settings: whether the settings of a recipe may follow; they are put into `arguments.settings`.
        """
        parser: Parser = self._parsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"{notes}Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(action=action or (lambda arguments: parser.print_help()), takes_settings=settings)
        return parser

    def add_nested(self, name: str, help: str, example: str, action: Action) -> Parser:
        """Add a verb of a verb, such as `list` of `recipes`."""
        parser: Parser = self._parsers.add_parser(name, help=help, epilog=f"Example: {example}", allow_abbrev=False)
        parser.set_defaults(action=action)
        return parser
