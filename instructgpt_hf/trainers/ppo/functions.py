"""Reward functions of the user: what they receive, and errors that name the function for what they do wrong."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import numbers
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instructgpt_hf._compat.quirks import COMPLETION_COLUMN
from instructgpt_hf.data.values import short
from instructgpt_hf.errors import InstructGPTError, first_line

# TRL's signature: prompts, completions and completion_ids by keyword, then the dataset's other columns; None where the
# reward does not apply.
RewardFunction = Callable[..., Sequence[float | None]]

# What every reward function receives beside the dataset's columns.
TAKEN_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_columns(columns: Iterable[str], where: str) -> None:
    """Raise unless the columns of the prompts can be passed to reward functions.

    Raises:
        InstructGPTError: naming every column whose name is taken.
    """
    taken = [name for name in columns if name in TAKEN_COLUMNS]
    if taken:
        raise InstructGPTError(
            f"{where}: column {', '.join(map(repr, taken))}: reward functions receive something else under this name; "
            "rename the column, or remove it."
        )


def checked(function: RewardFunction) -> RewardFunction:
    """A reward function whose exceptions and wrong returns are an `InstructGPTError` that names it.

    A coroutine function stays one. The dataset's column `completion` is passed on like every other.
    """
    name = function_name(function)

    @functools.wraps(function, updated=())
    def call(prompts: list[Any], **columns: Any) -> list[float | None]:
        with _own_errors(function, name):
            values = _read(function(prompts=prompts, **_own_columns(columns)))
        return _checked_values(name, values, len(prompts))

    @functools.wraps(function, updated=())
    async def call_later(prompts: list[Any], **columns: Any) -> list[float | None]:
        with _own_errors(function, name):
            values = _read(await function(prompts=prompts, **_own_columns(columns)))  # type: ignore[misc]
        return _checked_values(name, values, len(prompts))

    return call_later if is_coroutine_function(function) else call  # type: ignore[return-value]


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Whether calling it returns a coroutine; of a partial or an object, whether calling what it stands for does."""
    inner = _inner(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def function_name(function: Callable[..., Any]) -> str:
    """`module:function`, as recipes name it."""
    inner = _inner(function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}:{named.__qualname__}"


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _own_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns under their names in the dataset."""
    return {"completion" if name == COMPLETION_COLUMN else name: values for name, values in columns.items()}


@contextlib.contextmanager
def _own_errors(function: Callable[..., Any], name: str) -> Iterator[None]:
    """Raise what a reward function raises as `InstructGPTError`, with the line of the function that led to it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
        raise InstructGPTError(f"reward function {name} raised {message}{_own_line(function, error)}") from error


def _own_line(function: Callable[..., Any], error: BaseException) -> str:
    """The innermost line of the function's file in the traceback of an error, or nothing where it has none."""
    inner = inspect.unwrap(_inner(function))
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    if code is None:
        return ""
    own = [item for item in traceback.extract_tb(error.__traceback__) if item.filename == code.co_filename]
    if not own:
        # It could not even be called; its first line shows what it takes.
        return f" ({Path(code.co_filename).name}, line {code.co_firstlineno}: {_source(code)})"
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})"


def _source(code: Any) -> str:
    return linecache.getline(code.co_filename, code.co_firstlineno).strip()


def _read(values: Any) -> Any:
    """The values; what a generator function raises, it raises here."""
    return list(values) if isinstance(values, Iterator) else values


def _checked_values(name: str, values: Any, completions: int) -> list[float | None]:
    """What a reward function returned, as a list of numbers and None.

    Raises:
        InstructGPTError: if it is not one number, or None, for each completion; names what was returned.
    """
    expected = f"expected a list with one number for each of the {completions} completions, None where it has none"
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        kind = "" if values is None else f" ({type(values).__name__})"
        raise InstructGPTError(f"reward function {name} returned {short(values)}{kind}; {expected}.")
    items = list(values)
    if len(items) != completions:
        raise InstructGPTError(f"reward function {name} returned {len(items)} values: {short(items)}; {expected}.")
    numbered = [item.item() if _is_scalar(item) else item for item in items]
    for index, item in enumerate(numbered):
        if not (item is None or isinstance(item, numbers.Real)):
            raise InstructGPTError(
                f"reward function {name} returned at index {index} {short(item)} ({type(item).__name__}); {expected}."
            )
    return [None if item is None else float(item) for item in numbered]


def _is_scalar(item: Any) -> bool:
    """Whether it is a number in the wrapping of torch or numpy."""
    return isinstance(item, (torch.Tensor, np.ndarray, np.generic)) and item.ndim == 0
