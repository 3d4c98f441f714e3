"""Single values of a row: text, and lists and numbers that CSV files and databases write in their own ways."""

from __future__ import annotations

import ast
import json
import re
from decimal import Decimal
from typing import Any

RENAME = "a column of another meaning needs another name"  # the advice for a column with values of another type
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE = re.compile(r"[+-]?\d+")


class WrongRow(ValueError):
    """What is wrong with a row: column, value and rule.

    Attributes:
        tolerable: the row only lacks something to learn from, as a few of thousands do in any large dataset, which go
            on without them.
    """

    def __init__(self, problem: str, tolerable: bool = False) -> None:
        super().__init__(problem)
        self.tolerable = tolerable


def is_text(value: Any) -> bool:
    """Whether a value is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())


def is_blank(value: Any) -> bool:
    """Whether a value is None or a string of white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def parsed(value: str, column: str) -> Any:
    """The value that a text writes as JSON or as a Python literal, such as `['a', 'b']`.

    Raises:
        WrongRow: if it writes neither.
    """
    try:
        return characters(json.loads(value))
    except (ValueError, RecursionError):
        pass
    try:
        return characters(ast.literal_eval(value.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise WrongRow(f"{column}: found {short(value)}, which is neither JSON nor a Python list") from error


def characters(value: Any) -> Any:
    """A JSON value whose texts hold characters alone: half of a surrogate pair becomes the replacement character.

    Texts cut in the middle of an emoji have such halves, which no tokenizer and no Arrow table takes.
    """
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [characters(item) for item in value]
    if isinstance(value, dict):
        return {characters(name): characters(item) for name, item in value.items()}
    return value


def as_list(value: Any, column: str) -> Any:
    """The list that a value is or writes; other values that are no text stay as they are."""
    if not isinstance(value, str):
        return value
    found = parsed(value, column)
    if not isinstance(found, list):
        raise WrongRow(f"{column}: found {short(value)}, expected a list")
    return found


def as_number(value: Any) -> Any:
    """The number that a value is or writes, such as a decimal or `"4.5"`; None for empty text; else the value."""
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text:
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return value if "_" in text else float(text)
    except ValueError:
        return value


def short(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
