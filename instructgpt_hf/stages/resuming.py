"""From which checkpoint a stage goes on."""

from __future__ import annotations

from pathlib import Path

from instructgpt_hf._compat.checkpoints import checkpoints, set_aside
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.processes import is_main, wait
from instructgpt_hf.stages.run import StageRun


def check_resume(run: StageRun, mark: str, keep: bool = False) -> None:
    """Make sure that `resume_from_checkpoint` can be done, without writing anything.

    Args:
        mark: the stage's fingerprint.
        keep: the work folder's checkpoints are this stage's although its fingerprint is another one.

    Raises:
        InstructGPTError: if the checkpoints were made with other settings, or the named one is not among them.
    """
    wanted = run.settings.training_args.resume_from_checkpoint
    found = checkpoints(run.checkpoint_folder)
    if wanted in (None, True, False) and not (wanted and found):
        return
    setting = f"resume_from_checkpoint = {wanted!r}"
    if not found:
        raise InstructGPTError(
            f"{setting}: the {run.name} stage has no checkpoints in {run.checkpoint_folder}; remove it."
        )
    if not (keep or run.worked_on(mark)):
        raise InstructGPTError(
            f"{setting}: the checkpoints in {run.checkpoint_folder} were made with other settings, data or earlier stages. "
            "Restore these, or remove resume_from_checkpoint to start over."
        )
    if wanted is not True and _named(wanted) not in _places(found):
        names = ", ".join(path.name for _, path in sorted(found.items()))
        raise InstructGPTError(
            f"{setting}: is not a checkpoint of the {run.name} stage; {run.checkpoint_folder} has {names}."
        )


def resume_step(run: StageRun) -> int | None:
    """The optimizer step of the checkpoint to train on from, without touching it."""
    wanted, found = run.settings.training_args.resume_from_checkpoint, checkpoints(run.checkpoint_folder)
    if wanted in (None, True, False):
        return max(found, default=None)
    return _places(found)[_named(wanted)]


def checkpoint_of(run: StageRun) -> Path | None:
    """The checkpoint to train on from: the one that `resume_from_checkpoint` names, or else the newest, if any.

    Checkpoints after a named one are set aside, so that a later run does not go on from them.
    """
    step, found = resume_step(run), checkpoints(run.checkpoint_folder)
    if step is None:
        return None
    wait()  # until every process has read what is there
    if is_main():
        for later in (item for item in found if item > step):
            set_aside(run.checkpoint_folder, later)
    return found[step]


def _named(wanted: str) -> Path:
    return Path(wanted).expanduser().resolve()


def _places(found: dict[int, Path]) -> dict[Path, int]:
    return {path.resolve(): step for step, path in found.items()}
