"""Going on after a PPO run that was stopped, with settings that were changed for it.

A checkpoint belongs to the settings that made it, so other settings start over. After a stop, those that the stop's
message tells the user to change may be other ones; stage.json records the change.
"""

from __future__ import annotations

import json
from typing import Any

from instructgpt_hf._compat.checkpoints import last_checkpoint
from instructgpt_hf.config.settings import adjustable_keys
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.processes import is_main
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.trainers.ppo.watchdog import TrainingStopped

STOP_FILE = "stopped.json"


def note_stop(run: StageRun, fixed: str, stop: TrainingStopped) -> InstructGPTError:
    """Note in the work folder what may go on from its checkpoints.

    Args:
        fixed: fingerprint of the stage without its adjustable settings.
        stop: what ended training.

    Returns:
        The error for the user.
    """
    if last_checkpoint(run.checkpoint_folder) is None:
        return InstructGPTError(f"{stop}\n  - then run the same command again")
    _write(run, {"fixed": fixed, "settings": _settings(run), "changes": changes(run)})
    return InstructGPTError(
        f"{stop}\n  - then run the same command again: it goes on from that checkpoint, also with other values of "
        f"{', '.join(adjustable_keys('ppo'))}; delete {run.checkpoint_folder} to start over"
    )


def goes_on(run: StageRun, fixed: str) -> bool:
    """Whether the work folder is of a stopped run that differs from this one in adjustable settings only."""
    return last_checkpoint(run.checkpoint_folder) is not None and _read(run).get("fixed") == fixed


def note_changes(run: StageRun, step: int | None) -> None:
    """Note in the work folder how this run's settings differ from the stopped one's; `changes` reads it.

    Args:
        step: of the checkpoint that the run goes on from; changes after it belong to steps that are taken again.
    """
    if not is_main():
        return
    note, now = _read(run), _settings(run)
    changed = {key: [old, now[key]] for key, old in note["settings"].items() if old != now[key]}
    earlier = [change for change in note["changes"] if change["after_step"] <= (step or 0)]
    if changed:
        earlier.append({"after_step": step, **changed})
    _write(run, note | {"settings": now, "changes": earlier})


def changes(run: StageRun) -> list[dict[str, Any]]:
    """The changes of settings on the way, oldest first: `after_step`, and [old, new] by setting."""
    found: list[dict[str, Any]] = _read(run).get("changes", [])
    return found


def _read(run: StageRun) -> dict[str, Any]:
    file = run.checkpoint_folder / STOP_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(run: StageRun, note: dict[str, Any]) -> None:
    """Replace the note in one step: other processes read it."""
    if is_main():
        unfinished = run.checkpoint_folder / f"{STOP_FILE}.unfinished"
        unfinished.write_text(json.dumps(note), encoding="utf-8")
        unfinished.replace(run.checkpoint_folder / STOP_FILE)


def _settings(run: StageRun) -> dict[str, Any]:
    settings = {key: getattr(run.settings.training_args, key) for key in adjustable_keys("ppo")}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read back
    return plain
