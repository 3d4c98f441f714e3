"""Rows of local files as Python values. What one row holds never changes how another one is read.

Arrow gives every column one type, so a column that is null for a while and then text cannot be read, and a CSV value
such as `NA`, `True` or `0010` becomes another one. Here JSON and Parquet keep the type of each value, and CSV is text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, IterableDataset

from instructgpt_hf.data.values import characters
from instructgpt_hf.errors import InstructGPTError, Problems, first_line

Row = dict[str, Any]

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

HEAD = 20  # rows that tell how a dataset is written
STREAM_HEAD = 1_000  # rows that tell the columns of a stream
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}  # of CSV files

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a field may be a long text; the default is 128 KiB


class FileFormat(NamedTuple):
    """Format of a file (one of `FORMATS`) and the function that opens it."""

    suffix: str
    open: Callable[..., IO[Any]]


class FileRows:
    """Rows of one or several local files, read anew in every iteration.

    Args:
        files: the files, all of a known format.
        role: what the data is for; begins every error.
    """

    def __init__(self, files: Sequence[Path], role: str) -> None:
        self.files, self.role = list(files), role

    def numbered(self) -> Iterator[tuple[str, Row]]:
        """Every row after its place: its number in the file, from 0, behind the file's name where there are several.

        Raises:
            InstructGPTError: if a file cannot be read, naming the line where that is known.
        """
        folder = os.path.commonpath([file.parent for file in self.files])
        for file in self.files:
            name = f"{os.path.relpath(file, folder)}: " if len(self.files) > 1 else ""
            for number, row in enumerate(read_file(file, self.role)):
                yield f"{name}row {number}", row

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.numbered())

    @cached_property
    def count(self) -> int:
        """Number of rows."""
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self.count

    def stream(self) -> IterableDataset:
        """The rows as a stream of `datasets`, with the columns of the first `STREAM_HEAD` rows."""
        arguments = {"files": self.files, "role": self.role, "columns": tuple(columns_of(self, STREAM_HEAD))}
        return IterableDataset.from_generator(_stream, gen_kwargs=arguments)


class Head(Sequence[Row]):
    """The first rows of a dataset.

    Attributes:
        more: whether the dataset has more rows, so that shares and absences in these say nothing about it.
    """

    def __init__(self, rows: Iterable[Row], count: int) -> None:
        read = list(itertools.islice(rows, count + 1))
        self.rows, self.more = read[:count], len(read) > count

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


Rows: TypeAlias = FileRows | Dataset | IterableDataset | Sequence[Row]


def is_part(rows: Rows) -> bool:
    """Whether there are more rows than these."""
    return isinstance(rows, Head) and rows.more


def numbered(rows: Rows) -> Iterator[tuple[str, Row]]:
    """Every row after its place, `row 0` and so on; in several files also the file's name."""
    if isinstance(rows, FileRows):
        return rows.numbered()
    return ((f"row {number}", row) for number, row in enumerate(rows))


def columns_of(rows: Iterable[Row], count: int = HEAD) -> list[str]:
    """Columns of the first rows, of which each may lack some."""
    return list(dict.fromkeys(name for row in itertools.islice(rows, count) for name in row))


def _stream(files: list[Path], role: str, columns: tuple[str, ...]) -> Iterator[Row]:
    for file in files:
        for row in read_file(file, role):
            yield {name: row.get(name) for name in columns}


def file_format(path: Path) -> FileFormat | None:
    """Format of a file by its name, such as `train.jsonl.gz` or `DATA.CSV`; None if it is not read."""
    name, suffix = path, path.suffix.lower()
    opener = COMPRESSED.get(suffix)
    if opener is not None:
        name = path.with_suffix("")
    suffix = name.suffix.lower()
    if suffix not in FORMATS or (opener is not None and suffix == ".parquet"):
        return None
    return FileFormat(suffix, opener or open)


def read_file(path: Path, role: str) -> Iterator[Row]:
    """Rows of one file.

    Raises:
        InstructGPTError: if the format is not known or the file cannot be read as it.
    """
    kind = file_format(path)
    if kind is None:
        known = f"{', '.join(FORMATS)}, all but the last also compressed ({', '.join(COMPRESSED)})"
        raise InstructGPTError(f"{role}: {path}: format {path.suffix!r} is not read; convert it to one of {known}.")
    where = f"{role}: {path} could not be read as {kind.suffix[1:]}"
    try:
        if kind.suffix == ".parquet":
            yield from _parquet(path)
            return
        # "utf-8-sig" also reads the byte order mark that spreadsheets write.
        with kind.open(path, "rt", encoding="utf-8-sig", newline="" if kind.suffix == ".csv" else None) as stream:
            yield from {".csv": _csv, ".json": _json, ".jsonl": _json_lines}[kind.suffix](stream, where)
    except UnicodeDecodeError as error:
        raise InstructGPTError(f"{where}: it is not UTF-8 text ({first_line(error)}); save it as UTF-8") from error
    except (csv.Error, EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise InstructGPTError(f"{where}: {first_line(error)}") from error


def _parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1_000):
            yield from batch.to_pylist()


def _json_lines(stream: Iterable[str], where: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                row = _loaded(line, f"{where}: line {number}")
            except json.JSONDecodeError as error:
                raise InstructGPTError(f"{where}: line {number}, column {error.colno}: {error.msg}") from error
            yield _object(row, f"{where}: line {number}")


def _json(stream: IO[str], where: str) -> Iterator[Row]:
    """A list of objects, or one object per line."""
    text = stream.read()
    if not text.strip():
        return
    try:
        value = _loaded(text, where)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(text.split("\n"), where)  # not `splitlines`, which also splits inside values
            return
        raise InstructGPTError(f"{where}: {error}") from error
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        yield _object(row, f"{where}: row {number}")


def _loaded(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: if the text is not JSON.
        InstructGPTError: if it is, and Python cannot hold the value.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # lists in lists in lists, or a number of thousands of digits
        raise InstructGPTError(f"{where}: {first_line(error)}") from error
    return characters(value) if "\\u" in text else value


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InstructGPTError(f"{where}: found {type(value).__name__}, expected an object with the row's columns")
    return value


def _csv(stream: IO[str], where: str) -> Iterator[Row]:
    """Rows of text. A column without a name, such as an index that pandas wrote, is left out.

    Fields are parted by commas; where the header has none, by semicolons or tabs, as spreadsheets write them in many
    countries.

    Raises:
        InstructGPTError: at the end of the file, naming every line with another number of fields than the header.
    """
    start = list[str]()
    for text in stream:
        start.append(text)
        if text.strip():
            break
    delimiter = next((mark for mark in _DELIMITERS if mark in "".join(start)), ",")
    reader = csv.reader(itertools.chain(start, stream), delimiter=delimiter, strict=True)
    lines = _csv_lines(reader, where)
    header, _ = next(lines, ([], 0))
    named = [name for name in header if name]
    if repeated := sorted({name for name in named if named.count(name) > 1}):
        raise InstructGPTError(
            f"{where}: column {repeated[0]!r} stands in the header {named.count(repeated[0])} times"
        )
    problems = Problems(f"{where}:")
    for fields, line in lines:
        if len(fields) != len(header):
            problems.add(
                f"line {line} has {len(fields)} field{'s' * (len(fields) != 1)}, the header {len(header)}; put text "
                f'that holds {_DELIMITERS[delimiter]} in quotes: "Yes{delimiter} it is"'
            )
        elif not problems.items:
            yield {name: value for name, value in zip(header, fields, strict=True) if name}
    problems.raise_if_any()


def _csv_lines(reader: Any, where: str) -> Iterator[tuple[list[str], int]]:
    """Fields of every row that is not blank, and the line on which it begins."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            rule = 'a quote inside quotes is written twice: "He said ""yes"""'
            raise InstructGPTError(f"{where}: the row on line {line}: {error}; {rule}") from error
        if fields is None:
            return
        if fields:
            yield fields, line
