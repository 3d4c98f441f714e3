"""Upload finished stages to the Hub, one repository and one commit each."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from instructgpt_hf.artifacts import STAGE_FILE, STAGE_FOLDERS, VALUE_FOLDER, StageArtifact, finished_stages
from instructgpt_hf.errors import InstructGPTError, Problems, nearest
from instructgpt_hf.hub.bundle import Bundle, prepare, with_adapter_base
from instructgpt_hf.hub.card import render_card
from instructgpt_hf.hub.client import call
from instructgpt_hf.hub.sources import public_artifact

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

# Files of an earlier push that would be loaded with the new model unless it replaces them.
_WEIGHTS = (".safetensors", ".safetensors.index.json")
# Files that a push deletes in a repository unless it replaces them; the second holds training prompts and completions.
_STALE = ("config.json", "adapter_config.json", "rollouts.jsonl")
# Names of repositories, as the Hub accepts them.
_NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_LONGEST_NAME = 96
_VALUE_END = "-value"


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
        private: whether a new repository is private. An existing public one is refused while this is True, an
            existing private one while it is False.
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
    shown = public_artifact(artifact, links, as_trained=True)
    if value_model and (base := shown.model.get("bases", {}).get(VALUE_FOLDER)):
        shown.model["bases"] = {".": base}  # the value model is the repository's own model
    upload.texts[STAGE_FILE] = shown.text()
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

    A policy's value model goes to `{namespace}/{prefix}-{stage}-value`. Before any upload, all folders, the names
    of the repositories and the visibility of existing ones are checked. Stages of the run that were pushed earlier and
    are not pushed now are linked too.

    Args:
        run_folder: a run's folder, such as `runs/tiny-cpu`.
        namespace: user or organization; None for the user the token belongs to.
        private, token: see `push_stage`.
        stages: the stages to push; None for every finished one.
        prefix: first part of the repositories' names; None for the recipe's name.
        console: one line per repository, and one that names the files that are not sent; None prints nothing.

    Returns:
        Hub id by stage, and by `{stage}-value`.

    Raises:
        InstructGPTError: if a named stage is unknown or not finished, nothing is finished, the Hub does not accept a
            repository's name, a repository exists with the other visibility, or a push fails.
    """
    run = Path(run_folder)
    chosen = _chosen_stages(run, stages)
    artifacts = {stage: StageArtifact.load(run / stage) for stage in chosen}
    policies = [stage for stage in chosen if (run / stage / VALUE_FOLDER).is_dir()]
    firsts = {stage: prefix or artifacts[stage].recipe for stage in chosen}
    for stage, first in firsts.items():
        check_name(first, stage, value_model=stage in policies)
    not_sent = _check_folders(run, artifacts, policies)
    space = namespace or call("find out who you are on the Hub", lambda: _api(token).whoami()["name"], secret=token)
    repo_ids = {stage: f"{space}/{first}-{stage}" for stage, first in firsts.items()}
    for repo_id in (*repo_ids.values(), *(repo_ids[stage] + _VALUE_END for stage in policies)):
        _check_visibility(repo_id, private, _is_private(repo_id, token))
    if not_sent and console is not None:
        console.print(f"not sent: {', '.join(not_sent)}", highlight=False, markup=False, soft_wrap=True)
    earlier = _pushed_earlier(run, chosen, space, prefix, private, token)
    linked = {**artifacts, **{stage: artifact for stage, (artifact, _) in earlier.items()}}
    linked_ids = {**repo_ids, **{stage: repo_id for stage, (_, repo_id) in earlier.items()}}
    pushed: dict[str, str] = {}

    def push(stage: str, links: dict[str, str], end: str = "") -> None:
        name, repo_id = stage + end, repo_ids[stage] + end
        url = push_stage(run / stage, repo_id, private=private, token=token, links=links, value_model=bool(end))
        pushed[name] = repo_id
        if console is not None:
            console.print(f"{name}: pushed to {repo_id} ({url})", highlight=False, markup=False, soft_wrap=True)

    for stage in chosen:
        links = _links(stage, linked, linked_ids)
        if stage in policies:
            push(stage, {**links, stage: repo_ids[stage]}, end=_VALUE_END)
            links["value"] = pushed[stage + _VALUE_END]
        push(stage, links)
    return pushed


def check_name(first: str, stage: str, value_model: bool | None = None) -> None:
    """Raise unless the Hub accepts `first`, mostly the recipe's name, as the start of a stage's repository names.

    `value_model` says whether the stage has one to push; by default, PPO does.
    """
    has_value = stage.startswith("ppo") if value_model is None else value_model
    end = f"-{stage}{_VALUE_END if has_value else ''}"
    if _NAME.fullmatch(first + end) is None:
        valid = _nearest_name(first, len(end))
        raise InstructGPTError(
            f"{first + end!r}: the Hub accepts no repository of this name. A name has up to {_LONGEST_NAME} letters "
            "(without accents), digits, '-', '_' and '.', starts and ends with a letter, a digit or '_', and has "
            f"no '--' or '..'. The nearest to {first!r} is {valid!r}: give the recipe's folder that name before "
            f"training, or leave push_to_hub out; push what is trained with --prefix {valid}."
        )


def _nearest_name(first: str, rest: int) -> str:
    """The name closest to `first` that the Hub accepts as the start of a name with `rest` characters more."""
    plain = unicodedata.normalize("NFKD", first).encode("ascii", "ignore").decode()
    plain = re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", re.sub(r"[^\w.-]+", "-", plain, flags=re.ASCII)))
    return plain.strip("-.")[: _LONGEST_NAME - rest].rstrip("-.") or "run"


def _check_folders(run: Path, artifacts: dict[str, StageArtifact], policies: list[str]) -> list[str]:
    """Raise unless every folder can be pushed; returns the files that will not be sent, by path in the run."""
    not_sent: list[str] = []
    for stage, artifact in artifacts.items():
        for folder in (stage, f"{stage}/{VALUE_FOLDER}") if stage in policies else (stage,):
            not_sent += [f"{folder}/{name}" for name in prepare(run / folder, artifact, {}).not_sent]
    return not_sent


def _is_private(repo_id: str, token: str | None) -> bool | None:
    """Whether a repository is private; None if there is none, or none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def read() -> bool | None:
        try:
            return bool(_api(token).model_info(repo_id).private)
        except RepositoryNotFoundError:
            return None

    return call(f"read the repository {repo_id}", read, secret=token)


def _check_visibility(repo_id: str, private: bool, hidden: bool | None) -> None:
    """Raise if a repository is public for a private push or private for a public one; `hidden`: None if it is new."""
    if private and hidden is False:
        raise InstructGPTError(
            f"{repo_id}: the repository exists and is public, and this push is private; nothing was uploaded. Push "
            f"with --public (private=False), make it private with `hf repos settings {repo_id} --private`, or choose "
            "another name with --prefix."
        )
    if hidden and not private:
        raise InstructGPTError(
            f"{repo_id}: the repository exists and is private, and this push is public; nothing was uploaded. Make it "
            f"public with `hf repos settings {repo_id} --public` and push again, or push privately (without --public; "
            "private=True)."
        )


def _pushed_earlier(
    run: Path, chosen: list[str], namespace: str, prefix: str | None, private: bool, token: str | None
) -> dict[str, tuple[StageArtifact, str]]:
    """Record and Hub id of each finished stage not in `chosen` whose repository holds the same stage by fingerprint.

    A public push leaves out private repositories, so that no public card names them.
    """
    earlier: dict[str, tuple[StageArtifact, str]] = {}
    for stage in STAGE_FOLDERS:
        if stage in chosen or not (run / stage / STAGE_FILE).is_file():
            continue
        try:
            artifact = StageArtifact.load(run / stage)
        except InstructGPTError:
            continue  # a record that cannot be read must not stop the push of other stages
        name = f"{prefix or artifact.recipe}-{stage}"
        hidden = _is_private(f"{namespace}/{name}", token) if _NAME.fullmatch(name) else None
        if hidden is None or (hidden and not private):
            continue
        if _pushed_fingerprint(f"{namespace}/{name}", token) == artifact.fingerprint:
            earlier[stage] = artifact, f"{namespace}/{name}"
    return earlier


def _pushed_fingerprint(repo_id: str, token: str | None) -> str | None:
    """Fingerprint in a repository's `stage.json`; None if the repository has none."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    def read() -> str | None:
        try:
            path = _api(token).hf_hub_download(repo_id, STAGE_FILE)
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:  # raised when the connection fails
            raise ConnectionError(str(error)) from None
        return json.loads(Path(path).read_text(encoding="utf-8")).get("fingerprint")

    return call(f"read {STAGE_FILE} of {repo_id}", read, secret=token)


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
    # Read again after creating: an organization can make all its new repositories private.
    _check_visibility(repo_id, private, _is_private(repo_id, token))

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
    stale = [name for name in stale if name.endswith(_WEIGHTS) or name in _STALE]
    return [*added, *(CommitOperationDelete(name) for name in stale)]
