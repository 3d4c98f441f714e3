"""Where datasets are read from: the lab (`lab:<name>`), local files and folders, or the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub import HfApi

from instructgpt_hf._compat.hub_errors import reading
from instructgpt_hf._compat.quirks import dataset_fingerprint
from instructgpt_hf.artifacts import file_fingerprint, fingerprint, sampled_fingerprint
from instructgpt_hf.data.files import COMPRESSED, FORMATS, FileRows, file_format
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import LAB_PREFIX, lab_kind

LONG_DATASET = 5_000  # rows; reading more shows a progress bar
_PATTERN = re.compile(r"[*?\[]")


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
    ) -> FileRows | Dataset | IterableDataset:
        """Load one split and record it under `role`.

        The content of a stream is not read, so its fingerprint is that of its name and revision; of local files, also
        of their sizes and samples.

        Raises:
            InstructGPTError: if it cannot be read or has no rows.
        """
        source = self.resolve(name, split, role)
        rows = load_split(source, split, config, role, streaming)
        if streaming:
            record = describe_stream(source, split, config)
        else:
            (enable_progress_bars if len(rows) > LONG_DATASET else disable_progress_bars)()
            record = describe(rows, source, split)
        place = None if name.startswith(LAB_PREFIX) else local_place(source, split, role, config)
        self.records[role] = {**record, "source": name, "path": place, "config": config}
        return rows

    def read_again(self, record: dict[str, Any], role: str) -> FileRows | Dataset:
        """A split that an earlier stage read, by its record: the same rows, never another source of the same name.

        Raises:
            InstructGPTError: if it cannot be read here, or has changed.
        """
        name, split, config, place = record["source"], record["split"], record.get("config"), record.get("path")
        source = self.resolve(name, split, role)
        if place is not None:
            source = _first_local((place, source), split, role, config)
        rows = load_split(source, split, config, role)
        # Of a dataset on the Hub, the fingerprint also tells versions of the library apart.
        told = not name.startswith(LAB_PREFIX) and (place is not None or "path" not in record)
        if told and record["fingerprint"] not in _fingerprints(rows, source, split):
            raise InstructGPTError(
                f"{role}: {source}: has changed since, or is another dataset: its fingerprint is not the recorded one."
            )
        return rows

    def resolve(self, name: str, split: str, role: str) -> str:
        """Path or Hub id of a dataset: of the lab's, the file of a split; raises if the lab has no such dataset."""
        if not name.startswith(LAB_PREFIX):
            return name
        file = f"{lab_kind(name, role)}.{split}.jsonl"
        return str(self.lab_folder() / file)


def load_split(
    source: str, split: str, config: str | None = None, role: str = "dataset", streaming: bool = False
) -> FileRows | Dataset | IterableDataset:
    """One split of a Hub dataset, or of local files: see `local_files`.

    Args:
        source: Hub id, or path of a file, a folder or several files.
        split: split name; files that are named are read whole as any split.
        config: configuration of a Hub dataset, or of a folder that describes some.
        role: what the data is for; named in errors.
        streaming: return an IterableDataset, which reads rows when needed; of files, it has at least one.

    Raises:
        InstructGPTError: if the source is missing, unreadable, or empty.
    """
    if (files := local_files(source, split, role, config)) is not None:
        rows = FileRows(files, role)
        if next(iter(rows), None) is None:
            raise InstructGPTError(f"{role}: {', '.join(map(str, files))} has no rows.")
        return rows.stream() if streaming else rows
    wanted = f"{role}: {source!r} (config {config!r}, split {split!r})"
    message = f"{wanted} is neither a local path nor a Hub dataset that could be loaded"
    with reading(message, source, Exception, dataset=True):
        dataset = load_dataset(source, config, split=split, streaming=streaming)
    if not streaming and len(dataset) == 0:
        raise InstructGPTError(f"{role}: {source} (split {split!r}) has no rows.")
    return dataset


def local_files(source: str, split: str, role: str = "dataset", config: str | None = None) -> list[Path] | None:
    """The local files that a source and split name, or None if the source is a Hub id.

    A source is a file, whatever its name; a folder, with a file `<split>.<format>` or laid out as on the Hub (such as
    `data/train-00000-of-00001.parquet`, or as its README.md says); a pattern such as `parts/*.jsonl`; or several files
    with commas between them.

    Raises:
        InstructGPTError: if the source can only be a path and is not there, or is a folder without the split or with
            two files for it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _split_files(path, split, role, config)
    if "," in source:
        return [_named_file(part.strip(), role) for part in source.split(",")]
    if _PATTERN.search(source):
        # A folder's name may hold a bracket, too.
        folder = next(parent for parent in path.parents if parent.is_dir())
        found = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
        files = sorted(folder / name for name in found if (folder / name).is_file())
        if not files:
            raise InstructGPTError(f"{role}: {source}: no file has a name of this pattern.")
        return files
    if source.startswith((".", "/", "~")) or file_format(path) is not None:
        raise InstructGPTError(f"{role}: {source}: no such file or folder.")
    return None


def local_place(source: str, split: str, role: str = "dataset", config: str | None = None) -> str | None:
    """A local source with absolute paths, as records hold it; None for a Hub id."""
    if local_files(source, split, role, config) is None:
        return None
    parts = [source] if Path(source).expanduser().exists() else source.split(",")
    return ",".join(str(Path(part.strip()).expanduser().absolute()) for part in parts)


def _fingerprints(rows: FileRows | Dataset, source: str, split: str) -> list[str]:
    """The fingerprint of a dataset, and of a folder as earlier versions recorded it."""
    folder = Path(source).expanduser()
    whole = [file_fingerprint(folder)] if folder.is_dir() else []
    return [describe(rows, source, split)["fingerprint"], *whole]


def _first_local(sources: Iterable[str], split: str, role: str, config: str | None) -> str:
    """The first of the sources that is on this machine; raises the error of the first one if none is."""
    problems = []
    for source in sources:
        try:
            if local_files(source, split, role, config) is not None:
                return source
        except InstructGPTError as error:
            problems.append(error)
    raise problems[0]


def _named_file(name: str, role: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InstructGPTError(f"{role}: {name}: no such file.")
    return path


def split_file(folder: Path, split: str, role: str = "dataset") -> Path | None:
    """The file `<split>.<format>` of a folder, or None; raises InstructGPTError if there are two."""
    files = [
        item
        for item in sorted(folder.iterdir())
        if item.is_file() and (kind := file_format(item)) is not None and _stem(item) == split and kind
    ]
    if len(files) > 1:
        names = " and ".join(item.name for item in files)
        raise InstructGPTError(
            f"{role}: {folder}: {names} are both the split {split!r}; keep one, or name the file itself."
        )
    return files[0] if files else None


def _stem(path: Path) -> str:
    """Name without the format and a compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).stem


def _split_files(folder: Path, split: str, role: str, config: str | None) -> list[Path]:
    if config is None and (file := split_file(folder, split, role)) is not None:
        return [file]
    found = hub_layout(folder, config)
    if split in found:
        return found[split]
    names = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    splits = f"; its splits are {', '.join(found)}" if found else ""
    raise InstructGPTError(
        f"{role}: {folder}: no {split}{', '.join(FORMATS[:-1])} or {FORMATS[-1]} in it (it has: {names}{splits})."
    )


def hub_layout(folder: Path, config: str | None = None) -> dict[str, list[Path]]:
    """The files of every split of a folder that is laid out as on the Hub; empty if it is not.

    Raises:
        InstructGPTError: if the folder describes several configurations and `config` names none of them.
    """
    if not any(file_format(item) is not None for item in folder.rglob("*") if item.is_file()):
        return {}
    if _PATTERN.search(str(folder.resolve())):
        raise InstructGPTError(
            f"{folder}: `datasets` takes the brackets, * or ? in its path for a pattern; rename it, or name the files."
        )
    try:
        builder = load_dataset_builder(str(folder.resolve()), config)
    except Exception as error:
        problem = " ".join(str(error).split()).partition(" Example of usage")[0]
        raise InstructGPTError(f"{folder} with dataset_config {config!r}: {problem}") from error
    files = {str(name): [Path(file) for file in paths] for name, paths in (builder.config.data_files or {}).items()}
    readme = folder / "README.md"
    described = readme.is_file() and "data_files:" in readme.read_text(encoding="utf-8", errors="replace")
    # `datasets` takes every file for the split `train` where no name says more, such as a model's config.json.
    return {
        name: paths
        for name, paths in files.items()
        if all(file_format(path) is not None for path in paths)
        and (described or all(name in str(path.relative_to(folder.resolve())) for path in paths))
    }


def hub_revision(name: str) -> str | None:
    """The commit that a Hub dataset is at now; None if the Hub cannot be asked."""
    try:
        return HfApi().dataset_info(name).sha
    except Exception:
        return None


def describe(rows: FileRows | Dataset, source: str, split: str) -> dict[str, Any]:
    """Record of a dataset for stage.json: source, split, rows and a fingerprint of its content."""
    if isinstance(rows, FileRows):
        digests = [file_fingerprint(file) for file in rows.files]
        digest = digests[0] if len(digests) == 1 else fingerprint(digests)
    else:
        digest = dataset_fingerprint(rows)
    return {"source": str(source), "split": split, "rows": len(rows), "fingerprint": digest}


def describe_stream(source: str, split: str, config: str | None) -> dict[str, Any]:
    """Record of a stream for stage.json, whose content is not read."""
    files = local_files(source, split, config=config)
    revision = hub_revision(source) if files is None else None
    content: Any = revision
    if files is not None:
        content = [item for file in files for item in (file.stat().st_size, sampled_fingerprint(file))]
    digest = fingerprint([source, config, split, content])
    return {"split": split, "rows": None, "streaming": True, "revision": revision, "fingerprint": digest}
