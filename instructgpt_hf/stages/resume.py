"""From which checkpoint a stage resumes, also after a stop with settings or functions that were changed for it.

A checkpoint belongs to what made it, so whatever else determines the result starts over. After a stop, and where the
user asks for it, adjustable settings and the code of reward functions may differ; stage.json records the changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from instructgpt_hf._compat.checkpoints import checkpoints, last_checkpoint, set_aside
from instructgpt_hf.artifacts import atomic_text
from instructgpt_hf.config.settings import adjustable_keys
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.identity import Changes, describe, differences, may_go_on
from instructgpt_hf.stages.lifecycle import read_identity, set_aside_folders
from instructgpt_hf.stages.processes import barrier, is_main
from instructgpt_hf.stages.run import StageRun

STOP_FILE = "stopped.json"


class Resume(NamedTuple):
    """Where a stage starts.

    Attributes:
        step: optimizer step of the checkpoint to resume from; None starts from the beginning.
        source: folder of that checkpoint's run, if there is one.
        changes: how this run differs from the one that made it.
        reason: why that of an earlier run is set aside, if it is; `{aside}` stands for where.
    """

    step: int | None = None
    source: Path | None = None
    changes: Changes = {}  # noqa: RUF012 - never changed
    reason: str = ""


def find_resume(run: StageRun, identity: dict[str, Any]) -> Resume:
    """The checkpoint that `resume_from_checkpoint` names, or else the newest of a run that may go on as this one.

    Without the setting, that is one that differs in nothing, or that was stopped, with a message for the user, and
    differs in what `may_go_on`. Nothing is written.

    Args:
        identity: of the stage, from `stages.identity.stage_identity`.

    Raises:
        InstructGPTError: if the checkpoints were made with other settings, or the named one is not among them.
    """
    wanted, folder = run.settings.training_args.resume_from_checkpoint, run.checkpoint_folder
    saved = _own_checkpoints(run, folder)
    if wanted is False or (not saved and not isinstance(wanted, str)):
        return Resume(reason=": resume_from_checkpoint = False starts over" if wanted is False else "")
    setting = f"resume_from_checkpoint = {wanted!r}"
    if isinstance(wanted, str):
        place = Path(wanted).expanduser().resolve()
        folder = next((item for item in set_aside_folders(run) if item.resolve() == place.parent), folder)
        saved = _own_checkpoints(run, folder)
        if not saved:
            raise InstructGPTError(f"{setting}: the {run.name} stage has no checkpoints in {folder}; remove it.")
    changes = differences(run, read_identity(folder) or {}, identity)
    if changes and not may_go_on(run, changes) and wanted is not None:
        raise InstructGPTError(
            f"{setting}: the checkpoints in {folder} were made with other settings, data or earlier stages: "
            f"{describe(run, changes)}. Restore these, or remove resume_from_checkpoint to start over."
        )
    if changes and wanted is None and not (may_go_on(run, changes) and _read_stop(run).get("stopped")):
        return Resume(reason=_offer(run, changes, saved[max(saved)].name))
    if not isinstance(wanted, str):
        return Resume(max(saved), folder, changes)
    steps = {path.resolve(): step for step, path in saved.items()}
    if place not in steps:
        names = ", ".join(path.name for _, path in sorted(saved.items()))
        raise InstructGPTError(f"{setting}: is not a checkpoint of the {run.name} stage; {folder} has {names}.")
    return Resume(steps[place], folder, changes)


def _own_checkpoints(run: StageRun, folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder that are of the run whose folder it is, by their step."""
    owner, own = read_identity(folder), {}
    for step, path in checkpoints(folder).items():
        made_by = read_identity(path)
        if owner is not None and made_by is not None and may_go_on(run, differences(run, made_by, owner)):
            own[step] = path
        else:
            run.log(f"{path}: is of another run or stage; not used")
    return own


def _offer(run: StageRun, changes: Changes, newest: str) -> str:
    """Why checkpoints are set aside, and how to go on from them all the same."""
    how = "To go on from them" if may_go_on(run, changes) else "To go on from them, restore that and"
    return (
        f", because this has changed: {describe(run, changes)}. Training starts over. {how} "
        f"run it with --{run.settings.stage}.resume_from_checkpoint {{aside}}/{newest}; else delete that folder."
    )


def open_checkpoint(run: StageRun, step: int | None) -> Path | None:
    """Folder of the checkpoint of a step. Later ones are set aside, so that no later run resumes from them."""
    if step is None:
        return None
    saved = checkpoints(run.checkpoint_folder)
    barrier()
    if is_main():
        for later in (item for item in saved if item > step):
            set_aside(run.checkpoint_folder, later)
    return saved[step]


def record_stop(run: StageRun, stop: InstructGPTError) -> InstructGPTError:
    """Record in the checkpoint folder that the run was stopped by `stop`, and return the error for the user."""
    last = last_checkpoint(run.checkpoint_folder)
    if last is None:
        return InstructGPTError(f"{stop}\n  - then run the same command again")
    _write_stop(run, {"stopped": True, "changes": recorded_changes(run)})
    adjustable = adjustable_keys(run.settings.stage)
    also = f", also with other code of reward functions or other values of {', '.join(adjustable)}"
    return InstructGPTError(
        f"{stop}\n  - then run the same command again: it goes on from {last}{also if adjustable else ''}; "
        f"--{run.settings.stage}.resume_from_checkpoint false starts over"
    )


def record_changes(run: StageRun, start: Resume) -> None:
    """Record how this run differs from the one whose checkpoint it resumes from.

    Changes recorded after that step are dropped: they belong to steps that are taken again.
    """
    stop = _read_stop(run)
    changes = [change for change in stop.get("changes", []) if change["after_step"] <= (start.step or 0)]
    if start.changes:
        changes.append({"after_step": start.step, **start.changes})
    if stop or changes:
        _write_stop(run, stop | {"changes": changes})


def recorded_changes(run: StageRun) -> list[dict[str, Any]]:
    """Changes of settings between stops, oldest first: `after_step`, and [old, new] by setting."""
    changes: list[dict[str, Any]] = _read_stop(run).get("changes", [])
    return changes


def _read_stop(run: StageRun) -> dict[str, Any]:
    file = run.checkpoint_folder / STOP_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_stop(run: StageRun, stop: dict[str, Any]) -> None:
    """Replace the file in one step: other processes read it."""
    if is_main():
        atomic_text(run.checkpoint_folder / STOP_FILE, json.dumps(stop))
