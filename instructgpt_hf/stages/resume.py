"""From which checkpoint a stage resumes, also after a stop with settings that were changed for it.

A checkpoint belongs to the settings that made it, so other settings start over. After a stop, the adjustable settings
that the stop's message names may be other ones; stage.json records the changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from instructgpt_hf._compat.checkpoints import checkpoints, last_checkpoint, set_aside
from instructgpt_hf.artifacts import atomic_text
from instructgpt_hf.config.settings import adjustable_keys
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.lifecycle import owns_checkpoints
from instructgpt_hf.stages.processes import barrier, is_main
from instructgpt_hf.stages.run import StageRun

STOP_FILE = "stopped.json"


class Resume(NamedTuple):
    """Where a stage starts, and whose checkpoints are in its checkpoint folder."""

    step: int | None  # optimizer step of the checkpoint to resume from; None starts from the beginning
    keep: bool  # the checkpoints are this stage's
    adjusted: bool  # they are of a stopped run that differs in adjustable settings only


def find_resume(run: StageRun, digest: str, fixed: str) -> Resume:
    """The checkpoint that `resume_from_checkpoint` names, or else the newest, if any; nothing is written.

    Args:
        digest: the stage's fingerprint.
        fixed: the same without the adjustable settings.

    Raises:
        InstructGPTError: if the checkpoints were made with other settings, or the named one is not among them.
    """
    wanted, saved = run.settings.training_args.resume_from_checkpoint, checkpoints(run.checkpoint_folder)
    if wanted is False:
        return Resume(None, keep=False, adjusted=False)
    adjusted = bool(saved) and _read_stop(run).get("fixed") == fixed
    keep = adjusted or owns_checkpoints(run, digest)
    newest = max(saved, default=None)
    if wanted is None or (wanted is True and not saved):
        return Resume(newest if keep else None, keep, adjusted)
    setting = f"resume_from_checkpoint = {wanted!r}"
    if not saved:
        raise InstructGPTError(
            f"{setting}: the {run.name} stage has no checkpoints in {run.checkpoint_folder}; remove it."
        )
    if not keep:
        raise InstructGPTError(
            f"{setting}: the checkpoints in {run.checkpoint_folder} were made with other settings, data or earlier "
            "stages. Restore these, or remove resume_from_checkpoint to start over."
        )
    if wanted is True:
        return Resume(newest, keep, adjusted)
    steps = {path.resolve(): step for step, path in saved.items()}
    place = Path(wanted).expanduser().resolve()
    if place not in steps:
        names = ", ".join(path.name for _, path in sorted(saved.items()))
        raise InstructGPTError(
            f"{setting}: is not a checkpoint of the {run.name} stage; {run.checkpoint_folder} has {names}."
        )
    return Resume(steps[place], keep, adjusted)


def open_checkpoint(run: StageRun, step: int | None) -> Path | None:
    """Folder of the checkpoint of a step. Later ones are set aside, so that no later run resumes from them."""
    if step is None:
        return None
    saved = checkpoints(run.checkpoint_folder)
    barrier()  # until every process has read what is there
    if is_main():
        for later in (item for item in saved if item > step):
            set_aside(run.checkpoint_folder, later)
    return saved[step]


def record_stop(run: StageRun, fixed: str, stop: InstructGPTError) -> InstructGPTError:
    """Record in the checkpoint folder which runs may resume after `stop`, and return the error for the user."""
    if last_checkpoint(run.checkpoint_folder) is None:
        return InstructGPTError(f"{stop}\n  - then run the same command again")
    _write_stop(run, {"fixed": fixed, "settings": _adjustable(run), "changes": recorded_changes(run)})
    return InstructGPTError(
        f"{stop}\n  - then run the same command again: it goes on from that checkpoint, also with other values of "
        f"{', '.join(adjustable_keys(run.settings.stage))}; delete {run.checkpoint_folder} to start over"
    )


def record_changes(run: StageRun, step: int | None) -> None:
    """Record how this run's settings differ from the stopped one's, whose checkpoint of `step` it resumes from.

    Changes recorded after that step are dropped: they belong to steps that are taken again.
    """
    if not is_main():
        return
    stop, now = _read_stop(run), _adjustable(run)
    changed = {key: [old, now[key]] for key, old in stop["settings"].items() if old != now[key]}
    changes = [change for change in stop["changes"] if change["after_step"] <= (step or 0)]
    if changed:
        changes.append({"after_step": step, **changed})
    _write_stop(run, stop | {"settings": now, "changes": changes})


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


def _adjustable(run: StageRun) -> dict[str, Any]:
    training_args = run.settings.training_args
    settings = {key: getattr(training_args, key) for key in adjustable_keys(run.settings.stage)}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read back
    return plain
