"""Checks of a dataset's columns and rows that report everything wrong at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from instructgpt_hf.errors import InstructGPTError, Problems, nearest


def require_columns(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise if a column is missing, naming the columns there are.

    Raises:
        InstructGPTError: naming the dataset, the missing columns and the nearest existing ones.
    """
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        hints = [f"{name!r} ({nearest(name, dataset.column_names)})" for name in missing]
        raise InstructGPTError(
            f"{where}: missing column {', '.join(hints)}; it has {', '.join(map(repr, dataset.column_names))}."
        )


def check_rows(dataset: Dataset, where: str, problem_of: Callable[[dict[str, Any]], str | None]) -> None:
    """Check every row and report all the wrong ones at once.

    Args:
        problem_of: returns what is wrong with a row, or None.

    Raises:
        InstructGPTError: with one line per wrong row.
    """
    problems = Problems(f"{where}: wrong rows")
    for index, row in enumerate(dataset):
        problem = problem_of(row)
        if problem:
            problems.add(f"row {index}: {problem}")
    problems.raise_if_any()


def is_text(value: Any) -> bool:
    """Whether a value is a non-empty string or a non-empty list of chat messages."""
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value)
    )
