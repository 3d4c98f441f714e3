"""The checkpoints in a trainer's output folder: list them, set one aside, write one so that it is whole or absent."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints


def last_checkpoint(folder: Path, before: float = math.inf) -> Path | None:
    """The checkpoint of the highest optimizer step below `before`, or None."""
    earlier = {step: path for step, path in checkpoints(folder).items() if step < before}
    return earlier[max(earlier)] if earlier else None


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their optimizer step."""
    names = ((path, path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")) for path in folder.glob("checkpoint-*"))
    return {int(step): path for path, step in names if step.isdecimal() and path.is_dir()}


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoint of a step, if there is one, so that no run resumes from it and no push uploads it."""
    checkpoint, aside = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", folder / f"_stopped-{step}"
    if checkpoint.is_dir():
        shutil.rmtree(aside, ignore_errors=True)  # an earlier try that stopped at the same step
        with contextlib.suppress(FileNotFoundError):  # on a shared disk, another machine has renamed it
            checkpoint.rename(aside)


class WholeCheckpoints:
    """Gives a checkpoint folder its name only after every process has written its part.

    `checkpoint_files` are written into each: text by file name.

    Cause: the Trainer writes under the final name, so a killed process leaves what counts as a checkpoint.
    Goes when: the Trainer writes elsewhere and renames the folder.
    Relies on: `_save_checkpoint` asking `_get_output_dir` for the parent folder, and rotating checkpoints there.
    """

    UNFINISHED = ".unfinished"
    _unfinished = False
    checkpoint_files: Mapping[str, str] = MappingProxyType({})
    args: TrainingArguments
    state: TrainerState
    accelerator: Accelerator

    def files_of_checkpoint(self) -> dict[str, str]:
        """Text files that each checkpoint gets beside the Trainer's; every process calls it."""
        return dict(self.checkpoint_files)

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))  # type: ignore[misc]
        return os.path.join(folder, self.UNFINISHED) if self._unfinished else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._unfinished:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        unfinished, name = folder / self.UNFINISHED, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.accelerator.is_local_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._unfinished = False
        self.accelerator.wait_for_everyone()
        files = self.files_of_checkpoint()
        if self.args.should_save:
            for file, text in files.items():
                (unfinished / name / file).write_text(text, encoding="utf-8")
        if self.state.best_model_checkpoint == str(unfinished / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
        if self.accelerator.is_local_main_process:
            _move_into_place(unfinished / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            _keep_newest(folder, self.args.save_total_limit, self.state.best_model_checkpoint, unfinished)


def _keep_newest(folder: Path, limit: int, best: str | None, trash: Path) -> None:
    """Delete all but the newest checkpoints and the best one, from `trash`, so that no half of one stays behind."""
    names = sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)
    # The best one comes right before the newest, so a limit of one keeps two if they are not the same.
    two = best is not None and str(Path(best)) != names[-1]
    kept = max(limit, 2 if two else 1)
    trash.mkdir(exist_ok=True)
    for name in names[:-kept]:
        with contextlib.suppress(FileNotFoundError):  # on a shared disk, another machine has moved it
            os.replace(name, trash / Path(name).name)
    shutil.rmtree(trash, ignore_errors=True)


def _move_into_place(unfinished: Path, final: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # on a shared disk, the first machine renames the folder for all
        if final.exists() and unfinished.exists():
            os.replace(final, unfinished.with_name("replaced"))
        os.replace(unfinished, final)
    shutil.rmtree(unfinished.parent, ignore_errors=True)
