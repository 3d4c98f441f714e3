"""The public form of a stage's record: Hub ids as they are, local paths as `./name`, no tokens."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from instructgpt_hf.artifacts import StageArtifact
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
}
_SOURCE_LISTS = ("extra_reward_model_paths",)
_CACHED = re.compile(r"(?:^|[/\\\\])models--([^/\\\\]+)[/\\\\]snapshots[/\\\\][0-9a-f]{40}[/\\\\]?$")
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


def public_source(source: Any, check_disk: bool = False) -> Any:
    """The public form of `source`: a Hub id or `lab:` name unchanged, a local path as `./<last part>`.

    Without the dot, the name could be read as a Hub id and lead to somebody else's repository.

    Args:
        source: what a stage recorded; anything but a string is returned as it is.
        check_disk: whether a source in the form of a Hub id (`runs/sft`) is a local path if there is one on disk.
    """
    if not isinstance(source, str) or is_generated(source):
        return source
    if cached := _CACHED.search(source):
        return cached[1].replace("--", "/")
    if is_repo_id(source) and not (check_disk and Path(source).exists()):
        return source
    return f"./{bare_name(source)}"


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
    artifact: StageArtifact, links: dict[str, str] | None = None, check_disk: bool = False
) -> StageArtifact:
    """A copy of `artifact` without local paths and tokens.

    Args:
        artifact: the record as the stage wrote it.
        links: Hub ids by stage (`"sft"`, `"reward"`, ...) and `"base"`; they replace the recorded sources.
        check_disk: see `public_source`.
    """
    links = links or {}
    previous = {}
    for stage, item in artifact.previous.items():
        # A stage of the same run is recorded under its folder's name.
        own = f"./{stage}" if item.get("source") == stage else public_source(item.get("source"), check_disk)
        previous[stage] = {**scrub(item), "source": links.get(stage) or own}
    data = {
        role: {**scrub(item), "source": public_source(item.get("source"), check_disk)}
        for role, item in artifact.data.items()
    }
    base = links.get("base") or public_source(artifact.base_model.get("id"), check_disk)
    return dataclasses.replace(
        artifact,
        config=_public_config(artifact.config, links, check_disk),
        paper_defaults=_public_config(artifact.paper_defaults, links, check_disk),
        base_model={**scrub(artifact.base_model), "id": base},
        previous=previous,
        data=data,
        **{name: scrub(getattr(artifact, name)) for name in ("model", "metrics", "training", "versions", "hardware")},
    )


def _public_config(config: dict[str, Any], links: dict[str, str], check_disk: bool) -> dict[str, Any]:
    shown = {}
    for key, value in config.items():
        if key in _SECRET_KEYS or key in _PLACE_KEYS:
            continue
        if key in _SOURCE_KEYS:
            shown[key] = links.get(_SOURCE_KEYS[key]) or public_source(value, check_disk)
        elif key in _SOURCE_LISTS and isinstance(value, list):
            shown[key] = [public_source(item, check_disk) for item in value]
        else:
            shown[key] = scrub(value)
    return shown
