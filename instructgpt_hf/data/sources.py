"""Datasets from the Hub or from local files, with their columns checked and their content fingerprinted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import HfApi

from instructgpt_hf._compat.quirks import dataset_fingerprint
from instructgpt_hf.artifacts import _sampled, file_fingerprint, fingerprint
from instructgpt_hf.errors import InstructGPTError, Problems, nearest

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

BLANK_LIMIT = 2**20  # a larger file is not blank lines only


def load_split(
    source: str, split: str, config: str | None = None, role: str = "dataset", streaming: bool = False
) -> Dataset | IterableDataset:
    """One split of a Hub dataset, a local file, or a local folder of files named `<split>.<format>`.

    Args:
        source: Hub id, or path of a .jsonl, .json, .csv or .parquet file or of a folder.
        split: split name; a single local file is read whole as any split.
        config: configuration of a Hub dataset.
        role: what the data is for; named in errors.
        streaming: read rows when they are needed instead of all of them now.

    Returns:
        A Dataset; an IterableDataset, which has at least one row, if `streaming`.

    Raises:
        InstructGPTError: if the source is missing, unreadable, or empty.
    """
    path = local_file(source, split, role)
    if path is not None:
        dataset = _read_file(path, role, streaming)
    else:
        dataset = _read_hub(source, config, split, role, streaming)
    if not streaming and len(dataset) == 0:
        raise InstructGPTError(f"{role}: {source} (split {split!r}) has no rows.")
    return dataset


def local_file(source: str, split: str, role: str = "dataset") -> Path | None:
    """The local file that a source and split name, or None if the source is a Hub id.

    Raises:
        InstructGPTError: if the source can only be a path and is not there, or is a folder without the split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _file_of_split(path, split, role)
    if path.is_file():
        return path
    if source.startswith((".", "/", "~")) or path.suffix in FILE_FORMATS:
        raise InstructGPTError(f"{role}: {source}: no such file or folder.")
    return None


def _read_file(path: Path, role: str, streaming: bool) -> Any:
    if path.suffix not in FILE_FORMATS:
        raise InstructGPTError(
            f"{role}: {path}: format {path.suffix!r} is not read; convert it to one of {', '.join(FILE_FORMATS)}."
        )
    if path.stat().st_size == 0:
        raise InstructGPTError(f"{role}: {path} has no rows (the file is empty).")
    try:
        dataset = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", streaming=streaming)
        if streaming and next(iter(dataset), None) is None:
            raise InstructGPTError(f"{role}: {path} has no rows.")
        return dataset
    except InstructGPTError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        # How `datasets` reports a readable file without rows; before 5.0 it cannot read one of blank lines at all.
        blank = path.stat().st_size < BLANK_LIMIT and not path.read_bytes().strip()
        if blank or "corresponds to no data" in reason:
            raise InstructGPTError(f"{role}: {path} has no rows.") from error
        raise InstructGPTError(f"{role}: {path} could not be read as {path.suffix[1:]}: {reason}") from error


def _file_of_split(folder: Path, split: str, role: str) -> Path:
    files = [folder / f"{split}{suffix}" for suffix in FILE_FORMATS if (folder / f"{split}{suffix}").is_file()]
    if not files:
        found = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
        raise InstructGPTError(f"{role}: {folder}: no {split}.jsonl, .json, .csv or .parquet in it (it has: {found}).")
    return files[0]


def _read_hub(name: str, config: str | None, split: str, role: str, streaming: bool) -> Any:
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InstructGPTError(
            f"{role}: {name!r} (config {config!r}, split {split!r}) is neither a local path nor a Hub dataset that "
            f"could be loaded: {reason}"
        ) from error


def hub_revision(name: str) -> str | None:
    """The commit that a Hub dataset is at now; None if the Hub cannot be asked."""
    try:
        return HfApi().dataset_info(name).sha
    except Exception:
        return None


def describe(dataset: Dataset, source: str, split: str) -> dict[str, Any]:
    """What `stage.json` records of a dataset: source, split, rows and a fingerprint of its content."""
    path = Path(source).expanduser()
    digest = file_fingerprint(path) if path.exists() else dataset_fingerprint(dataset)
    return {"source": str(source), "split": split, "rows": len(dataset), "fingerprint": digest}


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


def describe_stream(source: str, split: str, config: str | None) -> dict[str, Any]:
    """What `stage.json` records of a stream."""
    file = local_file(source, split)
    revision = hub_revision(source) if file is None else None
    content = revision if file is None else [file.stat().st_size, _sampled(file)]
    mark = fingerprint([source, config, split, content])
    return {"split": split, "rows": None, "streaming": True, "revision": revision, "fingerprint": mark}
