"""The content of one push: a model folder's files, checked, and generated texts without local paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact
from instructgpt_hf.errors import Problems
from instructgpt_hf.hub.sources import public_artifact, public_source

VALUE_FOLDER = "value_model"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# Rendered for each push; the value model has a repository of its own.
_SKIPPED_NAMES = ("README.md", STAGE_FILE, "__pycache__", VALUE_FOLDER)
_CHECKPOINT_NAMES = ("checkpoints", "optimizer.safetensors", "scheduler.safetensors", "trainer_state.json")
_CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
_NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_PATH_KEYS = (*_NAME_KEYS, "tokenizer_file", "vocab_file", "merges_file")


class Bundle(NamedTuple):
    """Content of one commit, by path in the repository: files on disk and generated texts."""

    files: dict[str, Path]
    texts: dict[str, str]


def prepare(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> Bundle:
    """Collect a model folder's files, without local paths in their JSON.

    Args:
        folder: a stage's folder, or its value model's.
        artifact: the stage's record.
        links: Hub ids that replace sources; see `instructgpt_hf.hub.card.render_card`.

    Raises:
        InstructGPTError: listing every pickle, every file of training state, and missing weights or config.
    """
    problems = Problems(f"{folder}: cannot be pushed:")
    files: dict[str, Path] = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        parts = path.relative_to(folder).parts
        name = "/".join(parts)
        # The names of TensorBoard's files contain the host name.
        if any(part.startswith(".") or part in _SKIPPED_NAMES for part in parts) or "tfevents" in path.name:
            continue
        if path.suffix.lower() in _PICKLES:
            problems.add(f"{name} is a pickle, which can run code when loaded; save as safetensors or delete it")
        elif any(part in _CHECKPOINT_NAMES or part.startswith("checkpoint-") for part in parts):
            problems.add(f"{name} is the state of a training run; move it out of the stage's folder")
        else:
            files[name] = path
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        problems.add("there are no weights (*.safetensors)")
    if "config.json" not in files and "adapter_config.json" not in files:
        problems.add("there is neither config.json nor adapter_config.json")
    problems.raise_if_any()
    texts = {STAGE_FILE: public_artifact(artifact, links, check_disk=True).text()}
    for name in [name for name in files if name.split("/")[-1] in _CONFIG_FILES]:
        original = json.loads(files[name].read_text(encoding="utf-8"))
        changed = _without_paths(original, _known_paths(folder, artifact, links))
        if changed != original:
            texts[name] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            del files[name]
    return Bundle(files, texts)


def with_adapter_base(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> dict[str, str]:
    """`links`, for an adapter with `adapter_base`: the Hub id of the model it needs, or `./name` if none is known."""
    config = folder / "adapter_config.json"
    if not config.is_file() or "adapter_base" in links:
        return dict(links)
    original = json.loads(config.read_text(encoding="utf-8"))
    needed = _without_paths(original, _known_paths(folder, artifact, links)).get("base_model_name_or_path")
    return {**links, "adapter_base": str(needed)}


def _known_paths(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> dict[str, str]:
    """Hub id by local path, for the base model and the earlier stages of `folder`'s run."""
    run = folder.parent.parent if folder.name == VALUE_FOLDER else folder.parent
    known: dict[str, str] = {}
    for stage, item in artifact.previous.items():
        if stage in links:
            known[str((run / stage).resolve())] = links[stage]
            known[str(item.get("source"))] = links[stage]
    if "base" in links:
        known[str(artifact.base_model.get("id"))] = links["base"]
    return known


def _without_paths(values: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """A model's or tokenizer's JSON with each local path replaced by its Hub id or by `./name`."""
    changed = dict(values)
    for key in _PATH_KEYS:
        value = values.get(key)
        if isinstance(value, str) and value:
            resolved = str(Path(value).expanduser().resolve())
            changed[key] = known.get(value) or known.get(resolved) or public_source(value, check_disk=True)
    return changed
