"""The content of one push: the files that a stage is known to write, checked, and generated texts without local paths.

A file is sent because its name is on a list, never because it lies in the folder: `rollouts.jsonl` of PPO, for one,
holds training prompts and completions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from instructgpt_hf.artifacts import EVALUATION_FILES, STAGE_FILE, VALUE_FOLDER, StageArtifact, hub_snapshot
from instructgpt_hf.errors import Problems
from instructgpt_hf.hub.sources import public_artifact, public_source

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# Rendered for each push.
_GENERATED = ("README.md", STAGE_FILE)
_CHECKPOINT_NAMES = ("checkpoints", "optimizer.safetensors", "scheduler.safetensors", "trainer_state.json")
_CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
_NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_PATH_KEYS = (*_NAME_KEYS, "tokenizer_file", "vocab_file", "merges_file")

# Weights as transformers and PEFT write them, whole or in shards.
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
# Vocabularies by the names that transformers' tokenizers write (`vocab_files_names`), some with older versions,
# and by those of tokenizers with code of their own.
_VOCABULARIES = (
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "dict.txt", "emoji.json"),
    *("tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "ice_text.model", "source.spm", "target.spm", "target_vocab.json"),
    *("normalizer.json", "byte_maps.json", "prophetnet.tokenizer", "word_shape.json", "word_pronunciation.json"),
    *("vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "tekken.json"),
)
_MODEL_FILES = (
    *_CONFIG_FILES,
    *("generation_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *_VOCABULARIES,
)
# A policy's second weights: the average, or the last ones where the average is the policy.
_POLICY_FOLDERS = ("ema", "raw")
# Adapters of reward and value models keep the classifier's config here.
_CLASSIFIER_CONFIG = "classifier/config.json"


class Bundle(NamedTuple):
    """Content of one commit."""

    files: dict[str, Path]  # on disk, by path in the repository
    texts: dict[str, str]  # generated, by path in the repository
    not_sent: list[str]  # what lies in the folder besides, files and whole folders (`runs/`)


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
    others: list[str] = []
    code = _model_code(folder)
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        parts = path.relative_to(folder).parts
        name = "/".join(parts)
        # The value model has a repository of its own.
        if parts[0] == VALUE_FOLDER or name in _GENERATED:
            continue
        # The names of TensorBoard's files contain the host name.
        if any(part.startswith(".") or part == "__pycache__" for part in parts) or "tfevents" in path.name:
            others.append(name)
        elif path.suffix.lower() in _PICKLES:
            problems.add(f"{name} is a pickle, which can run code when loaded; save as safetensors or delete it")
        elif any(part in _CHECKPOINT_NAMES or part.startswith("checkpoint-") for part in parts):
            problems.add(f"{name} is the state of a training run; move it out of the stage's folder")
        elif _is_known(name, artifact.stage, folder.name == VALUE_FOLDER, code):
            files[name] = path
        elif path.name not in _GENERATED:
            others.append(name)
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        problems.add("there are no weights (*.safetensors)")
    if "config.json" not in files and "adapter_config.json" not in files:
        problems.add("there is neither config.json nor adapter_config.json")
    problems.raise_if_any()
    texts: dict[str, str] = {}
    known = _known_names(folder, artifact, links)
    for name in [name for name in files if name.split("/")[-1] in _CONFIG_FILES]:
        original = json.loads(files[name].read_text(encoding="utf-8"))
        changed = _without_paths(original, known)
        if changed != original:
            texts[name] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            del files[name]
    return Bundle(files, texts, _shortened(others, {*files, *texts}))


def _is_known(name: str, stage: str, value_model: bool, code: set[str]) -> bool:
    """Whether a stage's folder, or its value model's, is known to hold `name`; `code` are the model's Python files."""
    path = PurePosixPath(name)
    parent = "" if str(path.parent) == "." else str(path.parent)
    policy = stage.startswith("ppo") and not value_model
    if parent == "" or (policy and parent in _POLICY_FOLDERS):
        if path.name in _MODEL_FILES or path.name in code:
            return True
        if _WEIGHTS.fullmatch(path.name) or path.suffix == ".tiktoken":
            return True
    if parent == "additional_chat_templates":
        return path.suffix == ".jinja"
    if name == _CLASSIFIER_CONFIG:
        return stage == "reward" or value_model
    return name in EVALUATION_FILES and stage == "reward"


def _model_code(folder: Path) -> set[str]:
    """Names of the Python files that a model or tokenizer with code of its own is loaded with (`auto_map`)."""
    waiting: list[str] = []
    for config in (folder / name for name in _CONFIG_FILES):
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        for entry in (values.get("auto_map") or {}).values():
            classes = entry if isinstance(entry, list) else [entry]
            # "module.Class", or "namespace/name--module.Class" where the code stayed on the Hub.
            waiting += [item.split(".")[0] for item in classes if item and "--" not in item]
    found: set[str] = set()
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        if file.is_file() and file.name not in found:
            found.add(file.name)
            waiting += _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8"))
    return found


def _shortened(names: list[str], sent: set[str]) -> list[str]:
    """`names`, with a folder (`runs/`) in place of its files where nothing in the folder is sent."""
    used = {name.split("/")[0] for name in sent}
    short = (name if "/" not in name or name.split("/")[0] in used else f"{name.split('/')[0]}/" for name in names)
    return list(dict.fromkeys(short))


def with_adapter_base(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> dict[str, str]:
    """`links`, for an adapter with `adapter_base`: the Hub id of the model it needs, or `./name` if none is known."""
    config = folder / "adapter_config.json"
    if not config.is_file() or "adapter_base" in links:
        return dict(links)
    original = json.loads(config.read_text(encoding="utf-8"))
    needed = _without_paths(original, _known_names(folder, artifact, links)).get("base_model_name_or_path")
    return {**links, "adapter_base": str(needed)}


def _known_names(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> dict[str, str]:
    """Public name by recorded source and by local path, of the models that `folder`'s stage comes from."""
    shown = public_artifact(artifact, links, as_trained=True)
    sources = [(item, shown.previous[stage], "source") for stage, item in artifact.previous.items()]
    sources.append((artifact.base_model, shown.base_model, "id"))
    sources += [(item, shown.model["bases"][part], "id") for part, item in artifact.model.get("bases", {}).items()]
    run = folder.parent.parent if folder.name == VALUE_FOLDER else folder.parent
    known = {str((run / stage).resolve()): links[stage] for stage in artifact.previous if stage in links}
    for recorded, public, key in sources:
        for name in (recorded.get("path"), recorded.get(key)):
            if name and public[key]:
                known.setdefault(name, public[key])
    return known


def _without_paths(values: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """A model's or tokenizer's JSON with each local path replaced by its Hub id or by `./name`.

    The stages name models by local paths only: what has the form of a Hub id is a relative path, unless it is known.
    """
    changed = dict(values)
    for key in _PATH_KEYS:
        value = values.get(key)
        if isinstance(value, str) and value:
            resolved = str(Path(value).expanduser().resolve())
            changed[key] = known.get(value) or known.get(resolved) or public_source(value, local=True)
            snapshot = hub_snapshot(value)
            if snapshot and key == "base_model_name_or_path" and changed[key] == snapshot[0]:
                changed["revision"] = snapshot[1]
    return changed
