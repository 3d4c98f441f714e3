"""Checks of a dataset's columns and rows that report everything wrong at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset

from instructgpt_hf.errors import InstructGPTError, Problems, nearest


def require_columns(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise InstructGPTError if columns are missing, naming the nearest existing ones."""
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        hints = [f"{name!r} ({nearest(name, dataset.column_names)})" for name in missing]
        raise InstructGPTError(
            f"{where}: missing column {', '.join(hints)}; it has {', '.join(map(repr, dataset.column_names))}."
        )


def check_rows(dataset: Dataset, where: str, problem_of: Callable[[dict[str, Any]], str | None]) -> None:
    """Raise InstructGPTError with one line per row for which `problem_of` returns what is wrong with it."""
    raise_wrong_rows(where, enumerate(map(problem_of, dataset)))


def raise_wrong_rows(where: str, numbered: Iterable[tuple[int, str | None]]) -> None:
    """Raise InstructGPTError with one line per row whose problem is not None; `numbered` holds row and problem."""
    problems = Problems(f"{where}: wrong rows")
    for number, problem in numbered:
        if problem:
            problems.add(f"row {number}: {problem}")
    problems.raise_if_any()


def is_text(value: Any) -> bool:
    """Whether a value is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())


def is_messages(value: Any) -> bool:
    """Whether a value is a non-empty list of chat messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value)
    )


def check_texts(dataset: Dataset, columns: list[str], where: str, messages: bool = True) -> None:
    """Raise InstructGPTError unless the columns exist and hold text, or chat messages if allowed, in every row."""
    require_columns(dataset, columns, where)
    expected = "expected non-empty text" + (" or chat messages" if messages else "")

    def problem_of(row: dict[str, Any]) -> str | None:
        wrong = [name for name in columns if not is_text(row[name]) and not (messages and is_messages(row[name]))]
        return f"{wrong[0]}: found {short(row[wrong[0]])}, {expected}" if wrong else None

    check_rows(dataset.select_columns(columns), where, problem_of)


def short(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
