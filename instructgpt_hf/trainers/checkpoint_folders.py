"""The checkpoints in the folder that a trainer writes to: which there are, and setting one aside."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(folder: Path, before: float = math.inf) -> Path | None:
    """The checkpoint of the highest optimizer step below `before`, or None."""
    return max(((step, path) for step, path in checkpoints(folder).items() if step < before), default=(0, None))[1]


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their optimizer step."""
    found = ((path, path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")) for path in folder.glob("checkpoint-*"))
    return {int(step): path for path, step in found if step.isdecimal() and path.is_dir()}


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoint of a step, if there is one, so that no run resumes from it, and no push takes it."""
    checkpoint, aside = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", folder / f"_stopped-{step}"
    if checkpoint.is_dir():
        shutil.rmtree(aside, ignore_errors=True)  # an earlier try that stopped at the same step
        with contextlib.suppress(FileNotFoundError):  # on a disk that machines share, another one has done it
            checkpoint.rename(aside)
