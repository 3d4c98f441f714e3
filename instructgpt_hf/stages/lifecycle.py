"""From the first check of a stage to its finished folder: fingerprint, folders, stage.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from instructgpt_hf import __version__
from instructgpt_hf._compat.checkpoints import WholeCheckpoints
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact, atomic_folder, atomic_text, fingerprint
from instructgpt_hf.config.device import world_size
from instructgpt_hf.errors import NO_SPACE, InstructGPTError
from instructgpt_hf.models.origins import adapter_origins
from instructgpt_hf.stages.identity import describe, differences, finished_identity
from instructgpt_hf.stages.processes import barrier, is_main, shards_weights
from instructgpt_hf.stages.run import StageRun

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "huggingface_hub")
IDENTITY_FILE = "identity.json"  # in the checkpoint folder and in every checkpoint
EVENTS = "tensorboard"


def check_launch(training_args: TrainingArguments, stage: str) -> None:
    """Raise if the stage does not support the launch configuration.

    Raises:
        InstructGPTError: if the processes would not train together, or the weights that a stage needs whole to
            average, score and save them are sharded; it names what works.
    """
    if training_args.world_size != world_size():
        raise InstructGPTError(
            f"{world_size()} processes were launched, but without GPUs each would train for itself. Add --use_cpu "
            "for training on several CPU processes, or launch one."
        )
    sharding = shards_weights(training_args)
    if sharding and stage != "sft":
        raise InstructGPTError(
            f"{sharding} splits the weights over the processes, and the {stage} stage needs them whole. Launch it "
            "with ddp.yaml or deepspeed_zero2.yaml (recipes/accelerate_configs), or train adapters (use_peft)."
        )


def finished(run: StageRun, identity: dict[str, Any]) -> StageArtifact | None:
    """Record of the stage if it is finished and nothing that determines it has changed, else None.

    Checkpoints that a killed process left beside a finished stage are dropped.
    """
    if not (run.folder / STAGE_FILE).is_file():
        return None
    artifact = StageArtifact.load(run.folder)
    if artifact.fingerprint != fingerprint(identity):
        known = finished_identity(run, artifact)
        changes = differences(run, known, {key: identity.get(key) for key in known})
        what = describe(run, changes) or "earlier stages, models or the code of reward functions"
        run.log(f"finished before, but its settings, data or earlier stages have changed: training again ({what})")
        return None
    if is_main() and read_identity(run.checkpoint_folder) == identity:
        drop_checkpoints(run)
    run.log(f"already finished and unchanged, skipped ({run.folder})")
    return artifact


def check_folder(run: StageRun) -> None:
    """Raise unless the stage's folders can be written; nothing is written for that.

    Raises:
        InstructGPTError: if there is no permission, or a file has its name.
    """
    names = (run.folder, run.checkpoint_folder.parent, run.checkpoint_folder, run.lab_path)
    for folder in (*names, *([run.run_folder / "evaluation"] if run.settings.stage == "ppo" else [])):
        if os.path.exists(folder) and not folder.is_dir():
            raise InstructGPTError(f"{folder}: is a file where a folder of the run goes; choose another --output_dir.")
    # `os.path.exists`, because `Path.exists` raises inside a folder that may not be searched.
    parents = (run.run_folder, *run.run_folder.absolute().parents)
    existing = next(path for path in parents if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "no permission" if existing.is_dir() else "is a file"
        raise InstructGPTError(
            f"{run.run_folder}: cannot be written ({existing}: {reason}); choose another --output_dir."
        )


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What determines the stage whose checkpoint folder or checkpoint this is; None where nothing says so."""
    file = folder / IDENTITY_FILE
    identity: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return identity


def prepare_checkpoint_folder(run: StageRun, identity: dict[str, Any], source: Path | None, reason: str) -> None:
    """Make the checkpoint folder that of a stage with this identity.

    Args:
        source: folder with the checkpoints that the stage goes on from, or None if it starts from the beginning. What
            another run left is set aside, nothing is deleted.
        reason: for the user, why it is set aside.

    Raises:
        InstructGPTError: if the folder cannot be written.
    """
    barrier()  # until every process has read what is there
    if is_main():
        try:
            if source != run.checkpoint_folder:
                _set_aside(run, reason)
            if source is not None and source != run.checkpoint_folder:
                source.rename(run.checkpoint_folder)
                if (run.checkpoint_folder / EVENTS).is_dir():
                    run.events_folder.parent.mkdir(exist_ok=True)
                    (run.checkpoint_folder / EVENTS).rename(run.events_folder)
            run.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(run.checkpoint_folder / WholeCheckpoints.UNFINISHED, ignore_errors=True)
            atomic_text(run.checkpoint_folder / IDENTITY_FILE, json.dumps(identity))
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            raise InstructGPTError(
                f"{run.run_folder}: cannot be written ({error.strerror}); choose another --output_dir."
            ) from None
    barrier()


def set_aside_folders(run: StageRun) -> list[Path]:
    """The folders of runs that were set aside, `.work/<stage>.<number>`."""
    return [path for path in run.checkpoint_folder.parent.glob(f"{run.name}.*") if path.suffix[1:].isdecimal()]


def _set_aside(run: StageRun, reason: str) -> None:
    """Move the checkpoints and TensorBoard's files of a run that does not go on away from the next one's."""
    left, events = any(run.checkpoint_folder.glob("*-*")), run.events_folder.is_dir()
    if left or events:
        number = max((int(path.suffix[1:]) for path in set_aside_folders(run)), default=0) + 1
        aside = run.checkpoint_folder.with_name(f"{run.name}.{number}")
        if run.checkpoint_folder.is_dir():
            run.checkpoint_folder.rename(aside)
        if events:
            aside.mkdir(parents=True, exist_ok=True)
            run.events_folder.rename(aside / EVENTS)
        what = " and ".join(["checkpoints"] * left + ["TensorBoard's files"] * events)
        run.log(
            f"{what} of an earlier run are set aside in {aside}{reason.replace('{aside}', str(aside)) if left else ''}"
        )
    elif run.checkpoint_folder.is_dir():
        shutil.rmtree(run.checkpoint_folder)


def finish(run: StageRun, artifact: StageArtifact, save_models: Callable[[Path], None]) -> StageArtifact:
    """Write models (`save_models` gets the folder) and stage.json in one step, then drop the checkpoints."""
    artifact.finished_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if is_main():
        with atomic_folder(run.folder) as folder:
            save_models(folder)
            if bases := adapter_origins(folder):
                artifact.model["bases"] = bases
            artifact.save(folder)
        drop_checkpoints(run)
    barrier()
    return artifact


def drop_checkpoints(run: StageRun) -> None:
    """Delete the checkpoint folder, and its parent once it is empty."""
    shutil.rmtree(run.checkpoint_folder, ignore_errors=True)
    if not any(run.checkpoint_folder.parent.iterdir()):
        run.checkpoint_folder.parent.rmdir()


def stage_record(run: StageRun, digest: str, data: dict[str, dict[str, Any]], **values: Any) -> StageArtifact:
    """Record of a stage with what is the same for every stage filled in."""
    changed = run.settings.changed()
    defaults = {key: list(item) for key, item in run.settings.defaults_with_source().items() if key not in changed}
    return StageArtifact(
        stage=run.name,
        recipe=run.recipe,
        config=changed,
        paper_defaults=defaults,
        seed=run.seed,
        fingerprint=digest,
        data=data,
        versions=versions(),
        hardware=hardware(),
        **values,
    )


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide the numbers."""
    installed = {"instructgpt_hf": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def hardware() -> dict[str, Any]:
    """Device and number of processes; nothing that names the machine."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"device": device, "processes": processes, "platform": platform.system()}
