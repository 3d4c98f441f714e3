"""Errors a user can act on, all of one family so that the command line prints them without a traceback."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence


class InstructGPTError(ValueError):
    """Something in the user's input is wrong; the message says what, where, and what would be right."""


class Problems:
    """Collects every problem of one check so that all of them are reported at once."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.items: list[str] = []

    def add(self, problem: str) -> None:
        self.items.append(problem)

    def raise_if_any(self, limit: int = 20) -> None:
        """Raise one `InstructGPTError` that lists the problems added, up to `limit`; the rest is counted."""
        if not self.items:
            return
        lines = [f"  - {item}" for item in self.items[:limit]]
        if len(self.items) > limit:
            lines.append(f"  ... and {len(self.items) - limit} more")
        raise InstructGPTError("\n".join([self.title, *lines]))


def first_line(error: Exception) -> str:
    """First line of an error's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def loading_errors(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise a library's errors inside the block as `InstructGPTError`: `message` and the first line of the error.

    `kinds` are the types of errors, by default `OSError` and `ValueError`.
    """
    kinds = kinds or (OSError, ValueError)
    try:
        yield
    except kinds as error:
        raise InstructGPTError(f"{message}: {first_line(error)}") from error


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint that names the choice closest to `word`, or all of them where none is close and they are few."""
    known: Sequence[str] = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(known)}" if 0 < len(known) <= 12 else ""
