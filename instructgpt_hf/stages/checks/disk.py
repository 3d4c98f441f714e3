"""Whether the models of a run fit on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from instructgpt_hf.stages.checks.models import FoundModel, size_text
from instructgpt_hf.stages.checks.report import Report
from instructgpt_hf.stages.run import StageRun

HALF = ("bfloat16", "float16")


def check_disk(runs: Sequence[StageRun], model: FoundModel, report: Report) -> None:
    """Compare the free space with the least that the finished stages and downloads take.

    Checkpoints come on top, and stages that have a folder already are not counted: what is refused cannot work.

    Args:
        runs: the stages, each with the size of model that it leaves.
        model: the model that they start from.
    """
    folder, cache = _existing(runs[0].run_folder), _existing(Path(constants.HF_HUB_CACHE))
    models = sum(_models(run) * _size(run, model) for run in runs if not run.folder.exists())
    for place, needed, what in _by_disk((folder, models, "the finished models"), (cache, model.download, "downloads")):
        free = shutil.disk_usage(place).free
        if needed > free:
            report.problems.add(
                f"{place}: the disk has {size_text(free)} free, and {what} take at least {size_text(needed)}; "
                "checkpoints come on top. Free some, or choose another --output_dir (HF_HOME for downloads)."
            )
        elif place == folder:
            report.found("all", "disk", place, f"{size_text(free)} free, {size_text(needed)} for models")


def _by_disk(*parts: tuple[Path, int, str]) -> list[tuple[Path, int, str]]:
    """The places with what they need; those on one disk are added up."""
    disks: dict[int, tuple[Path, int, str]] = {}
    for place, needed, what in parts:
        first, before, named = disks.get(place.stat().st_dev, (place, 0, ""))
        both = " and ".join(filter(None, (named, what if needed else "")))
        disks[place.stat().st_dev] = (first, before + needed, both)
    return list(disks.values())


def _models(run: StageRun) -> int:
    """Models of the policy's size in a stage's folder."""
    return 2 + bool(run.settings.training_args.ema_decay) if run.settings.stage == "ppo" else 1


def _size(run: StageRun, model: FoundModel) -> int:
    """Bytes of one model that a stage writes: at least half of the file's where it is loaded in half precision."""
    if run.settings.model_args.use_peft or model.adapter:
        return 0
    return model.weights // 2 if run.settings.model_args.dtype in HALF else model.weights


def _existing(path: Path) -> Path:
    """The path itself, or the closest folder above it that exists."""
    absolute = path.expanduser().absolute()
    return next(place for place in (absolute, *absolute.parents) if os.path.exists(place))
