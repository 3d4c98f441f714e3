"""Going on after a PPO run that was stopped, with settings that were changed for it.

A checkpoint belongs to the settings that made it, so other settings start over. After a stop, those that the stop's
message tells the user to change may be other ones; stage.json records the change.
"""

from __future__ import annotations

import json
from typing import Any

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.common import StageRun
from instructgpt_hf.trainers.guards import TrainingStopped, last_checkpoint

STOP_FILE = "stopped.json"
# They change what is learned from here on, not what a checkpoint holds or where in the data it stands.
ADJUSTABLE = (
    "beta",
    "cliprange_value",
    "epsilon",
    "kl_horizon",
    "kl_target",
    "learning_rate",
    "max_grad_norm",
    "missing_eos_penalty",
    "missing_eos_score",
    "ptx_coef",
    "reward_clip_range",
    "value_learning_rate",
    "vf_coef",
    "warmup_iterations",
)


def note_stop(run: StageRun, fixed: str, stop: TrainingStopped) -> InstructGPTError:
    """Note in the work folder what may go on from its checkpoints.

    Args:
        fixed: fingerprint of the stage without its adjustable settings.
        stop: what ended training.

    Returns:
        The error for the user.
    """
    if last_checkpoint(run.work) is None:
        return InstructGPTError(f"{stop}\n  - then run the same command again")
    note = {"fixed": fixed, "settings": _settings(run), "changes": changes(run)}
    (run.work / STOP_FILE).write_text(json.dumps(note), encoding="utf-8")
    return InstructGPTError(
        f"{stop}\n  - then run the same command again: it goes on from that checkpoint, also with other values of "
        f"{', '.join(ADJUSTABLE)}; delete {run.work} to start over"
    )


def goes_on(run: StageRun, fixed: str) -> bool:
    """Whether the work folder is of a stopped run that differs from this one in adjustable settings only.

    The changes are noted there; `changes` reads them.
    """
    file, checkpoint = run.work / STOP_FILE, last_checkpoint(run.work)
    if checkpoint is None or not file.is_file():
        return False
    note = json.loads(file.read_text(encoding="utf-8"))
    if note["fixed"] != fixed:
        return False
    now = _settings(run)
    changed = {key: [old, now[key]] for key, old in note["settings"].items() if old != now[key]}
    if changed:
        step = int(checkpoint.name.rsplit("-", 1)[1])
        note |= {"settings": now, "changes": [*note["changes"], {"after_step": step, **changed}]}
        file.write_text(json.dumps(note), encoding="utf-8")
    return True


def changes(run: StageRun) -> list[dict[str, Any]]:
    """The changes of settings on the way, oldest first: `after_step`, and [old, new] by setting."""
    file = run.work / STOP_FILE
    return json.loads(file.read_text(encoding="utf-8"))["changes"] if file.is_file() else []


def _settings(run: StageRun) -> dict[str, Any]:
    settings = {key: getattr(run.settings.training, key) for key in ADJUSTABLE}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read back
    return plain
