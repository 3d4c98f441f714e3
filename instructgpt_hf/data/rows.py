"""Reading all rows of a dataset: every wrong row is reported at once, and a few that only lack text are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Value

from instructgpt_hf.data.files import Row, Rows, columns_of, is_part, numbered
from instructgpt_hf.data.messages import to_messages
from instructgpt_hf.data.values import WrongRow
from instructgpt_hf.errors import InstructGPTError, Problems, nearest

TOLERATED = 100  # one row in so many may lack something to learn from
MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def first_columns(rows: Rows, where: str) -> list[str]:
    """Columns of the first rows; raises InstructGPTError if there are no rows."""
    columns = columns_of(rows)
    if not columns:
        raise InstructGPTError(f"{where}: has no rows.")
    return columns


def missing_columns(columns: Iterable[str], expected: Sequence[str], where: str) -> str:
    """The message that names the columns that a dataset lacks, with the nearest that it has, and all of these."""
    columns = list(columns)
    hints = [f"{name!r} ({nearest(name, columns)})" for name in expected if name not in columns]
    missing = ", ".join(hint.removesuffix(" ()") for hint in hints)
    return f"{where}: missing column {missing}; it has {', '.join(map(repr, columns))}."


def read_rows(rows: Rows, where: str, read: Callable[[Row], list[Row]]) -> tuple[list[Row], int]:
    """Read every row.

    Args:
        rows: the source's rows.
        where: role and name of the dataset, which begin the error.
        read: returns what a row stands for, usually one row; raises `WrongRow`.

    Returns:
        What was read, each with its place in the source as `row`; and the number of rows that were left out because
        they lack something to learn from, which at most one row in `TOLERATED` may.

    Raises:
        InstructGPTError: naming every wrong row.
    """
    done, wrong = list[Row](), WrongRows(where, is_part(rows))
    for place, row in numbered(rows):
        try:
            done += [{**item, "row": place} for item in read(row)]
        except WrongRow as problem:
            wrong.add(place, problem)
        wrong.read += 1
    wrong.raise_unless_tolerable()
    return done, wrong.tolerable


class WrongRows:
    """Wrong rows of a dataset, reported together.

    Args:
        where: role and name of the dataset.
        part: whether these are not all rows, so that it is not known how many lack something.

    Attributes:
        read: number of rows read, right and wrong.
        tolerable: number of those that only lack something to learn from.
    """

    def __init__(self, where: str, part: bool = False) -> None:
        self.problems, self.part = Problems(f"{where}: wrong rows"), part
        self.read = self.tolerable = 0

    def add(self, place: str, problem: WrongRow) -> None:
        self.problems.add(f"{place}: {problem}")
        self.tolerable += problem.tolerable

    def raise_unless_tolerable(self) -> None:
        """Raise InstructGPTError if a row is malformed, or if more than one in `TOLERATED` lacks something."""
        too_many = not self.part and self.tolerable * TOLERATED > self.read
        if too_many or self.tolerable < len(self.problems.items):
            self.problems.raise_if_any()


def uniform_prompts(rows: list[Row]) -> list[Row]:
    """Rows whose prompts are all text, or all messages where some are; a prompt of None stays."""
    if not any(isinstance(row["prompt"], list) for row in rows):
        return rows
    return [row if row["prompt"] is None else {**row, "prompt": to_messages(row["prompt"])} for row in rows]


def prompt_feature(rows: Sequence[Row]) -> Any:
    """Feature of the column `prompt` of uniform rows."""
    return MESSAGES if any(isinstance(row["prompt"], list) for row in rows) else Value("string")


def text_rows(rows: Sequence[Row]) -> Dataset:
    """Rows with `prompt`, text in `completion`, and `row`, as a dataset."""
    text = Value("string")
    features = Features({"prompt": prompt_feature(rows), "completion": text, "row": text})
    return Dataset.from_list(list(rows), features=features)


class Tokenized(NamedTuple):
    """Tokenized rows, counts of what was left out, and the index of each row among those that were tokenized."""

    rows: Dataset | IterableDataset
    counts: dict[str, int]
    kept: list[int]  # empty for a stream, whose rows are not known yet


def rendering(encode: Callable[[Row], Row], empty: Row) -> Callable[[Row, int], Row]:
    """`encode` for `Dataset.map(..., with_indices=True)`, which puts into `problem` why a row cannot be rendered.

    Args:
        encode: renders a row with a prompt format, which raises InstructGPTError where it cannot.
        empty: what stands for such a row.
    """

    def encoded(row: Row, index: int) -> Row:
        try:
            return {**encode(row), "problem": ""}  # not None: Arrow would take the column for one of nulls
        except InstructGPTError as error:
            return {**empty, "problem": f"{row.get('row') or f'row {index}'}: {error}"}

    return encoded


def raise_unrendered(problems: Iterable[str], where: str) -> None:
    """Raise InstructGPTError naming every row that has a problem."""
    found = Problems(f"{where}: rows that the prompt format cannot render")
    for problem in filter(None, problems):
        found.add(problem)
    found.raise_if_any()
