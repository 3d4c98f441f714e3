"""Upload finished stages to the Hub, one repository and one commit each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from instructgpt_hf.artifacts import STAGE_FILE, STAGE_FOLDERS, StageArtifact, finished_stages
from instructgpt_hf.errors import InstructGPTError, Problems, nearest
from instructgpt_hf.hub.bundle import VALUE_FOLDER, Bundle, prepare, with_adapter_base
from instructgpt_hf.hub.card import render_card
from instructgpt_hf.hub.client import call
from instructgpt_hf.hub.sources import public_artifact

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

# Files of an earlier push that would be loaded with the new model unless it replaces them.
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def push_stage(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    links: dict[str, str] | None = None,
    commit_message: str | None = None,
    value_model: bool = False,
) -> str:
    """Upload one stage's model, or its value model, as one commit, with a card rendered from its `stage.json`.

    Args:
        folder: a stage's folder.
        repo_id: `namespace/name`; the repository is created if it does not exist.
        private: whether a new repository is private. An existing public one is refused while this is True.
        token: a Hub token; by default the one of `hf auth login` or HF_TOKEN.
        links: Hub ids of the run's other models; see `instructgpt_hf.hub.card.render_card`.
        commit_message: title of the commit.
        value_model: upload the value model in a policy's folder, which is left out otherwise.

    Returns:
        URL of the commit, or of the latest one if nothing changed.

    Raises:
        InstructGPTError: if the folder is not a finished stage, holds pickles or checkpoints, or the Hub refuses.
    """
    artifact = StageArtifact.load(folder)
    path = Path(folder) / VALUE_FOLDER if value_model else Path(folder)
    links = with_adapter_base(path, artifact, links or {})
    upload = prepare(path, artifact, links)
    shown = public_artifact(artifact, links, check_disk=True)
    upload.texts["README.md"] = str(render_card(shown, repo_id=repo_id, links=links, value_model=value_model))
    model = f"value model of {artifact.stage}" if value_model else f"{artifact.stage} stage"
    message = commit_message or f"Add the {model} of {artifact.recipe}"
    return _commit(upload, repo_id, private, token, message)


def push_run(
    run_folder: str | Path,
    namespace: str | None,
    *,
    private: bool = True,
    stages: Iterable[str] | None = None,
    prefix: str | None = None,
    token: str | None = None,
    console: Console | None = None,
) -> dict[str, str]:
    """Upload every finished stage of a run to `{namespace}/{prefix}-{stage}`, with links between the cards.

    A policy's value model goes to `{namespace}/{prefix}-{stage}-value`. All folders are checked before any upload.

    Args:
        run_folder: a run's folder, such as `runs/tiny-cpu`.
        namespace: user or organization; None for the user the token belongs to.
        private, token: see `push_stage`.
        stages: the stages to push; None for every finished one.
        prefix: first part of the repositories' names; None for the recipe's name.
        console: one line per repository goes there; None prints nothing.

    Returns:
        Hub id by stage, and by `{stage}-value`.

    Raises:
        InstructGPTError: if a named stage is unknown or not finished, nothing is finished, or a push fails.
    """
    run = Path(run_folder)
    chosen = _chosen_stages(run, stages)
    artifacts = {stage: StageArtifact.load(run / stage) for stage in chosen}
    policies = [stage for stage in chosen if (run / stage / VALUE_FOLDER).is_dir()]
    for stage, artifact in artifacts.items():
        prepare(run / stage, artifact, {})
        if stage in policies:
            prepare(run / stage / VALUE_FOLDER, artifact, {})
    space = namespace or call("find out who you are on the Hub", lambda: _api(token).whoami()["name"], secret=token)
    repo_ids = {stage: f"{space}/{prefix or artifacts[stage].recipe}-{stage}" for stage in chosen}
    pushed: dict[str, str] = {}

    def push(stage: str, links: dict[str, str], end: str = "") -> None:
        name, repo_id = stage + end, repo_ids[stage] + end
        url = push_stage(run / stage, repo_id, private=private, token=token, links=links, value_model=bool(end))
        pushed[name] = repo_id
        if console is not None:
            console.print(f"{name}: pushed to {repo_id} ({url})", highlight=False)

    for stage in chosen:
        links = _links(stage, artifacts, repo_ids)
        if stage in policies:
            push(stage, {**links, stage: repo_ids[stage]}, end="-value")
            links["value"] = pushed[f"{stage}-value"]
        push(stage, links)
    return pushed


def _links(stage: str, artifacts: dict[str, StageArtifact], repo_ids: dict[str, str]) -> dict[str, str]:
    """Hub ids of the other stages whose fingerprints match those recorded in this stage's lineage, and vice versa."""
    own, links = artifacts[stage], {}
    for name, repo_id in repo_ids.items():
        if name != stage:
            earlier = own.previous.get(name, {}).get("fingerprint")
            later = artifacts[name].previous.get(stage, {}).get("fingerprint")
            if earlier in (None, artifacts[name].fingerprint) and later in (None, own.fingerprint):
                links[name] = repo_id
    return links


def _chosen_stages(run: Path, stages: Iterable[str] | None) -> list[str]:
    if stages is None:
        return finished_stages(run)
    problems = Problems(f"{run}: cannot push these stages:")
    wanted = list(stages)
    for stage in wanted:
        if stage not in STAGE_FOLDERS:
            problems.add(f"{stage!r} is no stage; {nearest(stage, STAGE_FOLDERS)}")
        elif not (run / stage / STAGE_FILE).is_file():
            problems.add(f"{stage!r} is not finished: {run / stage / STAGE_FILE} does not exist")
    problems.raise_if_any()
    return [stage for stage in STAGE_FOLDERS if stage in wanted]


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _commit(upload: Bundle, repo_id: str, private: bool, token: str | None, message: str) -> str:
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
        # Listed in each attempt: a commit whose response got lost has already deleted the stale files.
        remote = api.list_repo_files(repo_id)
        return str(api.create_commit(repo_id, _operations(upload, remote), commit_message=message).commit_url)

    return call(f"upload to {repo_id}", commit, secret=token)


def _operations(upload: Bundle, remote: list[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """New operations for one attempt; operations keep upload state and cannot be reused."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(name, path) for name, path in sorted(upload.files.items())]
    added += [CommitOperationAdd(name, text.encode()) for name, text in sorted(upload.texts.items())]
    stale = sorted(set(remote) - {*upload.files, *upload.texts})
    stale = [name for name in stale if name.endswith(_WEIGHTS) or name in ("config.json", "adapter_config.json")]
    return [*added, *(CommitOperationDelete(name) for name in stale)]
