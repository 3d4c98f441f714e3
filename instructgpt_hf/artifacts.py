"""stage.json: what one stage writes and the next one, evaluation and the cards read. Standard library only.

A stage's folder holds its model, its tokenizer and `stage.json`. Stages communicate through nothing else, so any of
them can run on another machine, and a card can be rebuilt without loading a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructgpt_hf.errors import NO_SPACE, InstructGPTError

STAGE_FILE = "stage.json"
FORMAT_VERSION = 1
VALUE_FOLDER = "value_model"  # in a policy's folder
EVALUATION_FILES = ("evaluation.json", "evaluation.png")  # in a reward model's folder: held-back rankings, in sums
# Stages in their order, each with the folders that it writes in a run: PPO-ptx has one beside plain PPO's.
FOLDERS_OF = {"sft": ("sft",), "reward": ("reward",), "ppo": ("ppo", "ppo-ptx")}
STAGES = tuple(FOLDERS_OF)
STAGE_FOLDERS = tuple(name for names in FOLDERS_OF.values() for name in names)
LICENSE_KEYS = ("license", "license_name", "license_link")  # of a model, as model cards name them
LARGE_FOLDER = 200 * 2**20
# A model's snapshot in the cache of the Hub's client.
_SNAPSHOT = re.compile(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")


@dataclass
class StageArtifact:
    """The record of one finished stage. Every value is plain JSON.

    Attributes:
        stage: one of `STAGE_FOLDERS`.
        config: the stage's settings that differ from this package's defaults, by key.
        paper_defaults: keys of the settings left at the default, with that default, for the fields this package adds
            or changes.
        prompt_format: how prompts become tokens; see `instructgpt_hf.data.prompts.PromptFormat.to_dict`.
        base_model: `{"id", "revision", "fingerprint"}` of the pretrained model the chain of stages started from, with
            `"path"` and `"weights"`; see `source_place` and `weights_fingerprint`.
        previous: for each earlier stage this one read (`"sft"`, `"reward"`; in PPO also `"reward_2"`, ... and
            `"value_start"`): `{"source", "revision", "path", "fingerprint"}`.
        data: for each dataset role (`"demonstrations"`, `"rankings"`, `"prompts"`, `"pretraining"`): `{"source",
            "path", "split", "rows", "fingerprint"}` and counts such as `"dropped_ties"`.
        model: `{"kind": "full" | "adapter", "architecture", "parameters", "trainable_parameters"}`; a reward model
            adds `"reward_shift"`; a stage with adapters adds `"bases"` (for each adapter by its subfolder, `"."` for
            the stage's own, `{"id", "revision", "path", "weights"}` of the model it needs); a policy adds
            `"value_model"` (subfolder), `"published_weights"` and `"rewards"` (for each `{"kind", "name", "weight"}`).
        metrics: numbers measured after training on held-out data, by name.
        training: `{"steps", "epochs", "seconds", "log": [...]}`; the log holds the trainer's records.
        versions: package name -> version.
        hardware: `{"device", "processes", "platform"}`.
        fingerprint: hash of everything that determines the result; a second run with the same one has nothing to do.
        finished_at: UTC time, ISO 8601.
    """

    stage: str
    recipe: str
    config: dict[str, Any]
    prompt_format: dict[str, Any]
    base_model: dict[str, Any]
    fingerprint: str
    seed: int
    paper_defaults: dict[str, Any] = field(default_factory=dict)
    previous: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    finished_at: str = ""
    format_version: int = FORMAT_VERSION

    def text(self) -> str:
        """The content of `stage.json`. Numbers that JSON cannot hold (NaN, infinity) are null."""
        return json.dumps(to_json(dataclasses.asdict(self)), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `folder/stage.json`."""
        path = Path(folder) / STAGE_FILE
        atomic_text(path, self.text())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> StageArtifact:
        """Read `folder/stage.json`.

        Raises:
            InstructGPTError: if the file is missing, is not JSON, or was written by a newer format.
        """
        path = Path(folder) / STAGE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InstructGPTError(
                f"{path}: not found. A stage's folder holds {STAGE_FILE}; run the stage first, or point to the folder "
                "that `instructgpt-hf run` or `push` wrote."
            ) from None
        except json.JSONDecodeError as error:
            raise InstructGPTError(f"{path}: not valid JSON ({error}).") from None
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            rule = f"this version of instructgpt_hf reads {FORMAT_VERSION}"
            raise InstructGPTError(f"{path}: format_version is {version!r}, {rule}.")
        known = inspect.signature(cls).parameters
        missing = sorted(key for key, item in known.items() if item.default is item.empty and key not in values)
        unknown = sorted(set(values) - set(known))
        if missing or unknown:
            raise InstructGPTError(f"{path}: missing keys {missing}, unknown keys {unknown}.")
        return cls(**values)


def finished_stages(run_folder: Path) -> list[str]:
    """The stages of a run that have a `stage.json`, in their order.

    Raises:
        InstructGPTError: if there is none.
    """
    finished = [stage for stage in STAGE_FOLDERS if (run_folder / stage / STAGE_FILE).is_file()]
    if not finished:
        raise InstructGPTError(
            f"{run_folder}: no finished stage here (none of {', '.join(STAGE_FOLDERS)} holds {STAGE_FILE}). "
            "Point to the output folder of `instructgpt-hf run`."
        )
    return finished


def to_json(value: Any) -> Any:
    """`value` as JSON holds it.

    Named tuples become objects, other tuples and sets lists, numpy and torch scalars numbers, numbers that are not
    finite null, paths and everything else text.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_json(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return to_json(value.item()) if hasattr(value, "item") else str(value)


def fingerprint(value: Any) -> str:
    """Hash of a JSON-able value, the same for equal values whatever the order of their keys."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of a file's bytes, or of all files of a folder with their names."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(item for item in root.rglob("*") if item.is_file())
    return _files_fingerprint(root, [item.relative_to(root) for item in files])


def _files_fingerprint(root: Path, names: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode() + b"\0")
        with (root / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder's content; for a large folder, of file names, sizes and samples of the files."""
    names = [item.relative_to(folder) for item in folder.rglob("*") if item.is_file()]
    # Where a Hub repository was downloaded to, `.cache` holds the client's notes.
    names = sorted(name for name in names if ".cache" not in name.parts)
    sizes = [(str(name), (folder / name).stat().st_size) for name in names]
    if sum(size for _, size in sizes) <= LARGE_FOLDER:
        return _files_fingerprint(folder, names)
    return fingerprint([*sizes, *(sampled_fingerprint(folder / name) for name in names)])


def weights_fingerprint(folder: Path) -> str:
    """Hash of a model's weights by names, sizes and samples: equal for every copy, whatever lies beside them."""
    files = sorted(folder.glob("*model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return fingerprint([(item.name, item.stat().st_size, sampled_fingerprint(item)) for item in files])


def hub_snapshot(path: str) -> tuple[str, str] | None:
    """Hub id and commit of a model's folder in the cache of the Hub's client; None for any other path."""
    found = _SNAPSHOT.search(path)
    return (found[1].replace("--", "/"), found[2]) if found else None


def source_place(path: str | os.PathLike[str]) -> str | None:
    """`path` of a source as records hold it: absolute if it is local, None if it came from the Hub.

    A relative path has the form of a Hub id, so that without this nobody could tell the two apart later.
    """
    place = Path(path).expanduser().absolute()
    return str(place) if place.exists() and hub_snapshot(str(place)) is None else None


def sampled_fingerprint(file: Path, blocks: int = 64, size: int = 4096) -> str:
    """Hash of blocks spread over a file: a retrained model differs in all of them."""
    digest, length = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as stream:
        for index in range(blocks):
            stream.seek(index * max(length - size, 0) // max(blocks - 1, 1))
            digest.update(stream.read(size))
    return digest.hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary: equal for models that read the same token ids."""
    return fingerprint(tokenizer.get_vocab())


def code_fingerprint(function: Callable[..., Any]) -> str:
    """Hash of the file that defines a function, or of its name where there is none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        file = None
    return file_fingerprint(file) if file is not None else fingerprint(getattr(function, "__name__", str(function)))


def atomic_text(file: Path, text: str) -> None:
    """Write a text file in one step: a reader sees the old content or the new one."""
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` if the block succeeds, and vanishes if not.

    Raises:
        InstructGPTError: if the parent folder cannot be written.
    """
    final = Path(target)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise InstructGPTError(
            f"{final.parent}: cannot be written ({error.strerror}). Choose another --output_dir."
        ) from None
    try:
        temporary.chmod(0o755)
        yield temporary
        if final.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
            os.replace(final, retired / final.name)
            os.replace(temporary, final)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(parent: Path, pattern: str) -> None:
    """Remove what a killed `atomic_folder` left of the folders `pattern`; no other process may be writing them.

    Where it was killed between its two last steps, the folder that it was about to replace gets its name back.
    """
    for retired in parent.glob(f".{pattern}.old.*/*"):
        if not (parent / retired.name).exists():
            os.replace(retired, parent / retired.name)
    for unfinished in parent.glob(f".{pattern}.*"):
        shutil.rmtree(unfinished, ignore_errors=True)
