"""Finished stages to the Hub, one repository and one commit each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructgpt_hf.artifacts import STAGE_FILE, STAGES, StageArtifact
from instructgpt_hf.errors import InstructGPTError, Problems, nearest
from instructgpt_hf.hub.card import render_card, render_value_card
from instructgpt_hf.hub.client import call
from instructgpt_hf.hub.sources import public_artifact, public_source

if TYPE_CHECKING:
    from huggingface_hub import HfApi

VALUE_FOLDER = "value_model"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# Written by training for itself, or about the machine; nobody who loads the model needs it.
_SKIPPED_NAMES = ("README.md", STAGE_FILE, "__pycache__", VALUE_FOLDER)
_CHECKPOINT_NAMES = ("checkpoints", "optimizer.safetensors", "scheduler.safetensors", "trainer_state.json")
# Files of an earlier push under the same id that would change what loads, if the new model does not replace them.
_MODEL_FILES = (".safetensors", ".safetensors.index.json")
_CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
_PATH_KEYS = (
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
)


@dataclass(frozen=True)
class _Upload:
    """What one commit holds: files on disk by their path in the repository, and generated texts."""

    files: dict[str, Path]
    texts: dict[str, str]


def push_stage(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    links: dict[str, str] | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload one stage's folder as one commit, with a card rendered from its `stage.json`.

    The value model in a policy's folder is left out; `push_run` gives it a repository of its own.

    Args:
        folder: a stage's folder.
        repo_id: `namespace/name`; the repository is created if it does not exist.
        private: whether a new repository is private. An existing public one is refused while this is True.
        token: a Hub token; by default the one of `hf auth login` or HF_TOKEN.
        links: Hub ids of the run's other models; see `instructgpt_hf.hub.card.render_card`.
        commit_message: title of the commit.

    Returns:
        URL of the commit; of the latest one where nothing changed.

    Raises:
        InstructGPTError: if the folder is not a finished stage, holds pickles or checkpoints, or the Hub refuses.
    """
    path = Path(folder)
    artifact = StageArtifact.load(path)
    links = _with_adapter_base(path, artifact, links or {})
    upload = _prepared(path, artifact, links)
    upload.texts["README.md"] = str(render_card(_public(artifact, links), repo_id=repo_id, links=links))
    message = commit_message or f"Add the {artifact.stage} stage of {artifact.recipe}"
    return _commit(upload, repo_id, private, token, message)


def push_value_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    links: dict[str, str] | None = None,
) -> str:
    """Upload the value model of a policy's stage folder; arguments, result and errors are those of `push_stage`."""
    path = Path(folder)
    artifact = StageArtifact.load(path)
    links = _with_adapter_base(path / VALUE_FOLDER, artifact, links or {})
    upload = _prepared(path / VALUE_FOLDER, artifact, links)
    upload.texts["README.md"] = str(render_value_card(_public(artifact, links), repo_id=repo_id, links=links))
    return _commit(upload, repo_id, private, token, f"Add the value model of {artifact.stage} of {artifact.recipe}")


def push_run(
    run_folder: str | Path,
    namespace: str | None,
    *,
    private: bool = True,
    stages: Iterable[str] | None = None,
    prefix: str | None = None,
    token: str | None = None,
    console: Any = None,
) -> dict[str, str]:
    """Upload every finished stage of a run to `{namespace}/{prefix}-{stage}`, with links between the cards.

    A policy's value model goes to `{namespace}/{prefix}-{stage}-value`. Everything is checked before the first upload.

    Args:
        run_folder: a run's folder, such as `runs/tiny-cpu`.
        namespace: user or organization; None for the user the token belongs to.
        private: see `push_stage`.
        stages: the stages to push; None for every finished one.
        prefix: first part of the repositories' names; None for the recipe's name.
        token: see `push_stage`.
        console: a `rich.console.Console` that is told what happens; None for silence.

    Returns:
        Hub id by stage, and by `{stage}-value`.

    Raises:
        InstructGPTError: if a named stage is unknown or not finished, nothing is finished, or a push fails.
    """
    run = Path(run_folder)
    chosen = _chosen_stages(run, stages)
    artifacts = {stage: StageArtifact.load(run / stage) for stage in chosen}
    for stage, artifact in artifacts.items():
        _prepared(run / stage, artifact, {})
        if _has_value_model(run / stage):
            _prepared(run / stage / VALUE_FOLDER, artifact, {})
    space = namespace or _whoami(token)
    repo_ids = {stage: f"{space}/{prefix or artifacts[stage].recipe}-{stage}" for stage in chosen}
    pushed: dict[str, str] = {}
    for stage in chosen:
        links = {name: repo_id for name, repo_id in repo_ids.items() if name != stage}
        value_id = f"{repo_ids[stage]}-value" if _has_value_model(run / stage) else None
        if value_id:
            value_links = {**links, stage: repo_ids[stage]}
            url = push_value_model(run / stage, value_id, private=private, token=token, links=value_links)
            pushed[f"{stage}-value"] = value_id
            _say(console, f"{stage}-value", value_id, url)
            links["value"] = value_id
        url = push_stage(run / stage, repo_ids[stage], private=private, token=token, links=links)
        pushed[stage] = repo_ids[stage]
        _say(console, stage, repo_ids[stage], url)
    return pushed


def _say(console: Any, stage: str, repo_id: str, url: str) -> None:
    if console is not None:
        console.print(f"{stage}: pushed to {repo_id} ({url})", highlight=False)


def _chosen_stages(run: Path, stages: Iterable[str] | None) -> list[str]:
    finished = [stage for stage in STAGES if (run / stage / STAGE_FILE).is_file()]
    if stages is None:
        if not finished:
            raise InstructGPTError(
                f"{run}: no finished stage here (none of {', '.join(STAGES)} holds {STAGE_FILE}). "
                "Point to the output folder of `instructgpt-hf run`."
            )
        return finished
    problems = Problems(f"{run}: cannot push these stages:")
    wanted = list(stages)
    for stage in wanted:
        if stage not in STAGES:
            problems.add(f"{stage!r} is no stage; {nearest(stage, STAGES)}")
        elif stage not in finished:
            problems.add(f"{stage!r} is not finished: {run / stage / STAGE_FILE} does not exist")
    problems.raise_if_any()
    return [stage for stage in STAGES if stage in wanted]


def _has_value_model(folder: Path) -> bool:
    return (folder / VALUE_FOLDER).is_dir()


def _whoami(token: str | None) -> str:
    return str(call("find out who you are on the Hub", lambda: _api(token).whoami()["name"], secret=token))


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _is_local(source: str) -> bool:
    return Path(source).exists()


def _public(artifact: StageArtifact, links: dict[str, str]) -> StageArtifact:
    return public_artifact(artifact, links, _is_local)


def _with_adapter_base(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> dict[str, str]:
    """`links`, and for an adapter the model it needs: a Hub id where one is known, else a relative name."""
    config = folder / "adapter_config.json"
    if not config.is_file() or "adapter_base" in links:
        return dict(links)
    needed = _without_paths(json.loads(config.read_text(encoding="utf-8")), artifact, links)
    return {**links, "adapter_base": str(needed.get("base_model_name_or_path"))}


def _prepared(folder: Path, artifact: StageArtifact, links: dict[str, str]) -> _Upload:
    """The files to upload, after checking that they are a model without pickles and training state.

    Raises:
        InstructGPTError: listing every file that must not be there and every one that is missing.
    """
    problems = Problems(f"{folder}: cannot be pushed:")
    files: dict[str, Path] = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        parts = path.relative_to(folder).parts
        name = "/".join(parts)
        if any(part.startswith(".") or part in _SKIPPED_NAMES for part in parts) or "tfevents" in path.name:
            continue
        if path.suffix.lower() in _PICKLES:
            problems.add(
                f"{name} is a pickle, which can run code where it is loaded; save with safetensors or delete it"
            )
        elif any(part in _CHECKPOINT_NAMES or part.startswith("checkpoint-") for part in parts):
            problems.add(f"{name} is the state of a training run; move it out of the stage's folder")
        else:
            files[name] = path
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        problems.add("there are no weights (*.safetensors)")
    if "config.json" not in files and "adapter_config.json" not in files:
        problems.add("there is neither config.json nor adapter_config.json")
    problems.raise_if_any()
    texts = {STAGE_FILE: _stage_text(_public(artifact, links))}
    for name in [
        name
        for name in files
        if name.split("/")[-1] in ("config.json", "adapter_config.json", "tokenizer_config.json")
    ]:
        original = json.loads(files[name].read_text(encoding="utf-8"))
        changed = _without_paths(original, artifact, links)
        if changed != original:
            texts[name] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            del files[name]
    return _Upload(files, texts)


def _stage_text(artifact: StageArtifact) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return artifact.save(folder).read_text(encoding="utf-8")


def _without_paths(values: dict[str, Any], artifact: StageArtifact, links: dict[str, str]) -> dict[str, Any]:
    """A model's or tokenizer's JSON with each local path replaced by the id it was pushed to, or a relative name."""
    known = {item.get("source"): links[stage] for stage, item in artifact.previous.items() if stage in links}
    if "base" in links:
        known[artifact.base_model.get("id")] = links["base"]
    changed = dict(values)
    for key in _PATH_KEYS:
        value = values.get(key)
        if not isinstance(value, str) or not value:
            continue
        if value in known:
            changed[key] = known[value]
        else:
            changed[key] = public_source(value, _is_local)
    return changed


def _commit(upload: _Upload, repo_id: str, private: bool, token: str | None, message: str) -> str:
    """Create the repository if needed and commit; returns the commit's URL."""
    api = _api(token)
    where = f"the repository {repo_id}"
    call(f"create {where}", lambda: api.create_repo(repo_id, private=private, exist_ok=True), secret=token)
    info = call(f"read {where}", lambda: api.model_info(repo_id), secret=token)
    if private and not info.private:
        raise InstructGPTError(
            f"{repo_id}: the repository exists and is public, and this push is private. Push with --public "
            "(private=False), make the repository private in its settings, or choose another name."
        )

    def commit() -> str:
        # Listed anew in each attempt: a commit whose answer got lost has already deleted what is stale.
        remote = api.list_repo_files(repo_id)
        return str(api.create_commit(repo_id, _operations(upload, remote), commit_message=message).commit_url)

    return call(f"upload to {repo_id}", commit, secret=token)


def _operations(upload: _Upload, remote: list[str]) -> list[Any]:
    """Fresh operations for one attempt: they remember what they sent, so a repetition must not reuse them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added: list[Any] = [CommitOperationAdd(name, path) for name, path in sorted(upload.files.items())]
    added += [CommitOperationAdd(name, text.encode()) for name, text in sorted(upload.texts.items())]
    kept = {*upload.files, *upload.texts}
    stale = [
        name
        for name in sorted(remote)
        if name not in kept and (name.endswith(_MODEL_FILES) or name in ("config.json", "adapter_config.json"))
    ]
    return [*added, *(CommitOperationDelete(name) for name in stale)]
