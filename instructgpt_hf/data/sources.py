"""Where datasets are read from: the lab (`lab:<name>`), local files and folders, or the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub import HfApi

from instructgpt_hf._compat.quirks import dataset_fingerprint, reports_no_rows
from instructgpt_hf.artifacts import file_fingerprint, fingerprint, sampled_fingerprint
from instructgpt_hf.errors import InstructGPTError, loading_errors
from instructgpt_hf.lab import LAB_PREFIX, lab_kind

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LONG_DATASET = 5_000  # rows; reading more shows a progress bar


class Sources:
    """Reads the datasets of a stage and records what was read.

    Args:
        lab_folder: returns the folder with the lab's files, and writes them there first where they are missing.

    Attributes:
        records: what stage.json holds of every dataset read, by role.
    """

    def __init__(self, lab_folder: Callable[[], Path]) -> None:
        self.lab_folder = lab_folder
        self.records: dict[str, dict[str, Any]] = {}

    def read(
        self, name: str, config: str | None, split: str, role: str, streaming: bool = False
    ) -> Dataset | IterableDataset:
        """Load one split and record it under `role`.

        The content of a stream is not read, so its fingerprint is that of its name and revision; of a local file, also
        of its size and samples.

        Raises:
            InstructGPTError: if it cannot be read or has no rows.
        """
        source = self.resolve(name, split, role)
        if Path(source).is_file():
            disable_progress_bars()
        dataset = load_split(source, split, config, role, streaming)
        if streaming:
            record = describe_stream(source, split, config)
        else:
            (enable_progress_bars if len(dataset) > LONG_DATASET else disable_progress_bars)()
            record = describe(dataset, source, split)
        self.records[role] = {**record, "source": name, "config": config}
        return dataset

    def resolve(self, name: str, split: str, role: str) -> str:
        """Path or Hub id of a dataset: of the lab's, the file of a split; raises if the lab has no such dataset."""
        if not name.startswith(LAB_PREFIX):
            return name
        file = f"{lab_kind(name, role)}.{split}.jsonl"
        return str(self.lab_folder() / file)


def load_split(
    source: str, split: str, config: str | None = None, role: str = "dataset", streaming: bool = False
) -> Dataset | IterableDataset:
    """One split of a Hub dataset, a local file, or a local folder of files named `<split>.<format>`.

    Args:
        source: Hub id, or path of a .jsonl, .json, .csv or .parquet file or of a folder.
        split: split name; a single local file is read whole as any split.
        config: configuration of a Hub dataset.
        role: what the data is for; named in errors.
        streaming: return an IterableDataset, which reads rows when needed; of a file, it has at least one.

    Raises:
        InstructGPTError: if the source is missing, unreadable, or empty.
    """
    if (path := local_file(source, split, role)) is not None:
        dataset = _read_file(path, role, streaming)
    else:
        wanted = f"{role}: {source!r} (config {config!r}, split {split!r})"
        with loading_errors(f"{wanted} is neither a local path nor a Hub dataset that could be loaded", Exception):
            dataset = load_dataset(source, config, split=split, streaming=streaming)
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
        files = [path / f"{split}{suffix}" for suffix in FILE_FORMATS if (path / f"{split}{suffix}").is_file()]
        if not files:
            names = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
            raise InstructGPTError(
                f"{role}: {path}: no {split}.jsonl, .json, .csv or .parquet in it (it has: {names})."
            )
        return files[0]
    if path.is_file():
        return path
    if source.startswith((".", "/", "~")) or path.suffix in FILE_FORMATS:
        raise InstructGPTError(f"{role}: {source}: no such file or folder.")
    return None


def _read_file(path: Path, role: str, streaming: bool) -> Dataset | IterableDataset:
    if path.suffix not in FILE_FORMATS:
        raise InstructGPTError(
            f"{role}: {path}: format {path.suffix!r} is not read; convert it to one of {', '.join(FILE_FORMATS)}."
        )
    if path.stat().st_size == 0:
        raise InstructGPTError(f"{role}: {path} has no rows (the file is empty).")
    try:
        dataset = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", streaming=streaming)
        empty = next(iter(dataset), None) is None
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        if reports_no_rows(error, path):
            raise InstructGPTError(f"{role}: {path} has no rows.") from error
        raise InstructGPTError(f"{role}: {path} could not be read as {path.suffix[1:]}: {reason}") from error
    if empty:
        raise InstructGPTError(f"{role}: {path} has no rows.")
    return dataset


def hub_revision(name: str) -> str | None:
    """The commit that a Hub dataset is at now; None if the Hub cannot be asked."""
    try:
        return HfApi().dataset_info(name).sha
    except Exception:
        return None


def describe(dataset: Dataset, source: str, split: str) -> dict[str, Any]:
    """Record of a dataset for stage.json: source, split, rows and a fingerprint of its content."""
    path = Path(source).expanduser()
    digest = file_fingerprint(path) if path.exists() else dataset_fingerprint(dataset)
    return {"source": str(source), "split": split, "rows": len(dataset), "fingerprint": digest}


def describe_stream(source: str, split: str, config: str | None) -> dict[str, Any]:
    """Record of a stream for stage.json, whose content is not read."""
    file = local_file(source, split)
    revision = hub_revision(source) if file is None else None
    content = revision if file is None else [file.stat().st_size, sampled_fingerprint(file)]
    digest = fingerprint([source, config, split, content])
    return {"split": split, "rows": None, "streaming": True, "revision": revision, "fingerprint": digest}
