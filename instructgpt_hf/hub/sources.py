"""The public form of a stage's record: Hub ids as they are, local paths as `./name`, no tokens."""

from __future__ import annotations

import dataclasses
import re
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from instructgpt_hf.artifacts import StageArtifact, hub_snapshot
from instructgpt_hf.lab import LAB_MODEL, LAB_PREFIX

# One optional namespace and a name, in the characters the Hub allows.
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow", ".gz", ".zst", ".gguf", ".safetensors")
# Not preceded by a character that makes it part of a URL or of a word.
_ABSOLUTE = re.compile(r"(?<![\w:/.<])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:<>|]+[/\\])+([^\s/\\'\",;:<>|]+)")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
# Settings that name a source, and the link that replaces it where there is one.
_SOURCE_KEYS = {
    "dataset_name": "",
    "pretraining_dataset_name": "",
    "model_name_or_path": "base",
    "sft_model_path": "sft",
    "reward_model_path": "reward",
    "value_model_path": "",
    "extra_reward_model_paths": "",
}
_SECRET_KEYS = ("hub_token", "token", "push_to_hub_token")
# Settings about places on this machine, which do not change the result.
_PLACE_KEYS = ("output_dir", "logging_dir", "resume_from_checkpoint")


def is_repo_id(source: Any) -> TypeGuard[str]:
    """Whether `source` has the form of a Hub id, unlike file names, paths of three parts, `lab` and `lab:...`."""
    if not isinstance(source, str) or source.lower().endswith(_DATA_SUFFIXES) or is_generated(source):
        return False
    return _REPO_ID.fullmatch(source) is not None and "--" not in source and ".." not in source


def is_generated(source: str) -> bool:
    """Whether `source` names what instructgpt-hf generates itself: the base model `lab` or a dataset `lab:...`."""
    return source == LAB_MODEL or source.startswith(LAB_PREFIX)


def bare_name(source: str) -> str:
    """The last component of a path, whatever its separators."""
    return PurePosixPath(source.replace("\\", "/").rstrip("/")).name or "folder"


def public_source(source: Any, local: bool = False) -> Any:
    """The public form of `source`: a Hub id or `lab:` name unchanged, a local path as `./<last part>`.

    Without the dot, the name could be read as a Hub id and lead to somebody else's repository.

    Args:
        source: what a stage recorded; anything but a string is returned as it is.
        local: whether a source in the form of a Hub id (`runs/sft`) is a path all the same.
    """
    if not isinstance(source, str) or is_generated(source):
        return source
    if snapshot := hub_snapshot(source):
        return snapshot[0]
    return source if is_repo_id(source) and not local else f"./{bare_name(source)}"


def scrub(value: Any) -> Any:
    """A copy of `value` in which absolute paths inside strings are cut to their last part and Hub tokens removed."""
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items() if key not in _SECRET_KEYS}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if isinstance(value, str):
        return _TOKEN.sub("hf_***", _ABSOLUTE.sub(r"\1", value))
    return value


def public_artifact(
    artifact: StageArtifact, links: dict[str, str] | None = None, as_trained: bool = False
) -> StageArtifact:
    """A copy of `artifact` without local paths and tokens.

    What was local in training stays local, whatever lies there now. In a public record, the source of an entry that
    has no `path` is local if it begins with a dot.

    Args:
        artifact: the record as the stage wrote it, or a public one.
        links: Hub ids by stage (`"sft"`, `"reward"`, ...) and `"base"`; they replace the recorded sources.
        as_trained: whether the record is known to be the stage's own. One of an earlier version does not tell a
            relative path from a Hub id; of the two it is then taken for a path, unless it has a revision
            other than `main`, which is the default.
    """
    links = links or {}
    known: dict[str, str] = {}  # public form by source and by local path

    def public(item: dict[str, Any], key: str, link: str | None = None) -> dict[str, Any]:
        """An entry with a source under `key`, in public form."""
        source, place = item.get(key), item.get("path")
        shown = {name: value for name, value in scrub(item).items() if name != "path"}
        if link is None and isinstance(source, str):
            pinned = item.get("revision") not in (None, "main")
            recorded = place is not None if "path" in item else as_trained and not pinned
            link = (known.get(place) if place else None) or public_source(source, local=recorded)
        elif link is not None and link != source:
            shown.pop("revision", None)
        for name in (source, place):
            if name and link:
                known.setdefault(name, link)
        on_hub = is_repo_id(link) or (link is not None and is_generated(link))
        return {**shown, key: link, **({"path": None} if on_hub else {})}

    previous = {}
    for stage, item in artifact.previous.items():
        # A stage of the same run is recorded under its folder's name.
        own = f"./{stage}" if item.get("source") == stage else None
        previous[stage] = public(item, "source", links.get(stage) or own)
    base = public(artifact.base_model, "id", links.get("base"))
    data = {role: public(item, "source") for role, item in artifact.data.items()}
    model = scrub(artifact.model)
    if "bases" in artifact.model:
        model["bases"] = {name: public(item, "id") for name, item in artifact.model["bases"].items()}
    return dataclasses.replace(
        artifact,
        config=_public_config(artifact.config, links, known, as_trained),
        paper_defaults=scrub(artifact.paper_defaults),
        base_model=base,
        previous=previous,
        data=data,
        model=model,
        **{name: scrub(getattr(artifact, name)) for name in ("metrics", "training", "versions", "hardware")},
    )


def _public_config(
    config: dict[str, Any], links: dict[str, str], known: dict[str, str], as_trained: bool
) -> dict[str, Any]:
    """The settings without secrets and places; `known` are the public forms of the recorded sources."""

    def public(value: Any) -> Any:
        if isinstance(value, list):
            return [public(item) for item in value]
        return known.get(value) or public_source(value, local=as_trained)

    shown = {}
    for key, value in config.items():
        if key in _SECRET_KEYS or key in _PLACE_KEYS:
            continue
        if key in _SOURCE_KEYS:
            shown[key] = links.get(_SOURCE_KEYS[key]) or public(value)
        else:
            shown[key] = scrub(value)
    return shown
