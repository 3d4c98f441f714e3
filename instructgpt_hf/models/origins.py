"""Model folders by their source: where one lies on this machine, and whether it is the model of training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from instructgpt_hf import lab
from instructgpt_hf._compat.hub_errors import reading
from instructgpt_hf.artifacts import (
    STAGE_FILE,
    VALUE_FOLDER,
    StageArtifact,
    file_fingerprint,
    hub_snapshot,
    model_fingerprint,
    source_place,
    weights_fingerprint,
)
from instructgpt_hf.errors import InstructGPTError

ADAPTER_FILE = "adapter_config.json"
# Weights first. Neither pickles nor weights for other frameworks.
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken"]
_NO_REVISION = (None, "main")
_BASE = "base model of the adapter"


def base_model_folder(source: str, revision: str | None, role: str, weights: bool = True) -> Path:
    """As `resolve_source`, for pretrained models: `lab` is the base model that comes with the package."""
    return lab.base_model_path() if source == lab.LAB_MODEL else resolve_source(source, revision, role, weights)


def resolve_source(source: str, revision: str | None = None, role: str = "model", weights: bool = True) -> Path:
    """The local folder of a model, absolute; a Hub repository is downloaded into the cache.

    Args:
        source: local folder or Hub id.
        revision: of a Hub id.
        role: setting or kind of model, for the message.
        weights: False downloads everything else only, in order to look at a model.

    Raises:
        InstructGPTError: if it is neither a folder nor a repository that can be read, or a folder with a revision.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision not in _NO_REVISION:
            raise InstructGPTError(
                f"{role}: {source}: is a local folder, which has no revision {revision!r}; leave the revision out."
            )
        return path.absolute()
    return _download(source, revision, role, weights)


def _download(source: str, revision: str | None, role: str, weights: bool = True) -> Path:
    if source.startswith((".", "/", "~")):
        raise InstructGPTError(f"{role}: {source}: no such folder.")
    at = "" if revision in _NO_REVISION else f" (revision {revision!r})"
    message = f"{role}: {source!r}{at} is neither a local folder nor a model on the Hub that can be read"
    with reading(message, source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED[0 if weights else 1 :]))


def origin(source: str, revision: str | None, folder: Path) -> dict[str, Any]:
    """What stage.json holds to find a model again: `id`, `revision`, `path` if it is local, hash of its `weights`.

    The revision of a model on the Hub is its commit, because a branch moves on.
    """
    snapshot = hub_snapshot(str(folder))
    return {
        "id": source,
        "revision": snapshot[1] if snapshot else revision,
        "path": None if source == lab.LAB_MODEL else source_place(folder),
        "weights": weights_fingerprint(folder),
    }


def known_model(record: Mapping[str, Any], role: str, advice: str, name: str | None = None) -> Path:
    """The folder of a model that an earlier stage has read: the same weights, wherever they lie now.

    A model that was a local folder is never looked for on the Hub, where its path could be somebody else's id.

    Args:
        record: what `origin` recorded. Records of earlier versions have no `path` and no `weights`; the model is then
            told by the fingerprints they have.
        role: kind of model, for the message.
        advice: what else to do than to put the model where it was, for the message.
        name: where to look first.

    Raises:
        InstructGPTError: if the model is not found, or another one lies in its place.
    """
    folder = _known_here(record, role, advice, name)
    if folder is None:
        folder = _download(str(record["id"]), record.get("revision"), role)
        if not _is_same(folder, record):
            raise _another(folder, record, role, advice)
    return folder


def _known_here(record: Mapping[str, Any], role: str, advice: str, name: str | None) -> Path | None:
    """As `known_model`, on this machine; None for a model that can be on the Hub."""
    source, place = str(record["id"]), record.get("path")
    if source == lab.LAB_MODEL:
        return lab.base_model_path()
    places = [Path(item).expanduser().absolute() for item in (name, place, source) if item is not None]
    found = [item for item in places if item.is_dir()]
    for folder in found:
        if _is_same(folder, record):
            return folder
    if place is None and not source.startswith((".", "/", "~")):
        return None
    if found:
        raise _another(found[0], record, role, advice)
    raise InstructGPTError(
        f"{role}: {place or source}: no such folder. The model of training lay there: put it there, or {advice}."
    )


def _another(folder: Path, record: Mapping[str, Any], role: str, advice: str) -> InstructGPTError:
    return InstructGPTError(
        f"{role}: {record['id']} ({folder}): is another model than that of training, whose fingerprint {STAGE_FILE} "
        f"holds. Put that model there, or {advice}."
    )


def _is_same(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the model of `record`."""
    if "weights" in record:
        return weights_fingerprint(folder) == record["weights"]
    if record.get("stages") and (folder / STAGE_FILE).is_file():
        return StageArtifact.load(folder).fingerprint in record["stages"]
    known = record.get("fingerprint")
    # Earlier versions hashed all files, those in `.cache` too.
    return known is None or model_fingerprint(folder) == known or file_fingerprint(folder) == known


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds a PEFT adapter rather than whole weights."""
    return (folder / ADAPTER_FILE).is_file()


def adapter_values(folder: Path) -> dict[str, Any]:
    """The content of an adapter's `adapter_config.json`."""
    values: dict[str, Any] = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    return values


def adapter_base(folder: Path) -> Path:
    """Local folder of the base model of an adapter folder: of a stage's adapter, the model that it was trained on.

    Raises:
        InstructGPTError: if it is missing or another model.
    """
    record, name, advice = _recorded_base(folder)
    if "id" in record:
        return known_model(record, _BASE, advice, name)
    return resolve_source(name, None if Path(name).expanduser().is_dir() else record["revision"], _BASE)


def adapter_source(folder: Path) -> tuple[str, str | None]:
    """Source and revision of what `adapter_base` returns; nothing is downloaded, so the Hub's is not compared.

    Raises:
        InstructGPTError: if it was local, and is missing or another model.
    """
    record, name, advice = _recorded_base(folder)
    if "id" not in record:
        return name, None if Path(name).expanduser().is_dir() else record["revision"]
    here = _known_here(record, _BASE, advice, name)
    return (record["id"], record["revision"]) if here is None else (str(here), None)


def _recorded_base(folder: Path) -> tuple[dict[str, Any], str, str]:
    """What stage.json records of an adapter's base, its name in the adapter's config, and advice for `known_model`.

    The record has no `id` if the adapter belongs to no stage, or if the stage's record cannot tell.
    """
    values = adapter_values(folder)
    name, revision = str(values["base_model_name_or_path"]), values.get("revision")
    advice = f"write where it is as base_model_name_or_path into {folder / ADAPTER_FILE}"
    for place, part in ((folder, "."), (folder.parent, folder.name)):
        if not (place / STAGE_FILE).is_file():
            continue
        artifact = StageArtifact.load(place)
        if part in (bases := artifact.model.get("bases", {})):
            return dict(bases[part]), name, advice
        # Earlier versions recorded the pretrained model of the policy, and what the stage read.
        if part == VALUE_FOLDER and Path(name).expanduser().is_dir():
            break
        source, commit = hub_snapshot(name) or (name, revision)
        stages = [item.get("fingerprint") for item in artifact.previous.values()]
        old = {"id": source, "revision": commit, "fingerprint": artifact.base_model.get("fingerprint")}
        return {**old, "stages": stages}, name, advice
    return {"revision": revision}, name, advice


def adapter_origins(folder: Path) -> dict[str, dict[str, Any]]:
    """`origin` of the base of every adapter in a stage's new folder, by subfolder; `"."` is its own."""
    origins = {}
    for file in sorted(folder.rglob(ADAPTER_FILE)):
        name = str(adapter_values(file.parent)["base_model_name_or_path"])
        if (base := Path(name).expanduser()).is_dir():
            source = (hub_snapshot(name) or (name,))[0]
            source = lab.LAB_MODEL if base == lab.base_model_path() else source
            origins[file.parent.relative_to(folder).as_posix()] = origin(source, None, base)
    return origins
