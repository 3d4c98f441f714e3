"""From the first check of a stage to its finished folder: fingerprint, folders, stage.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from instructgpt_hf import __version__
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact, atomic_folder, fingerprint
from instructgpt_hf.config.device import world_size
from instructgpt_hf.config.settings import neutral_keys
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages.processes import barrier, is_main, shards_weights
from instructgpt_hf.stages.run import StageRun

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "huggingface_hub")
FINGERPRINT_FILE = "fingerprint"


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


def stage_fingerprint(
    run: StageRun, data: dict[str, dict[str, Any]], models: dict[str, Any], without: Collection[str] = ()
) -> str:
    """Hash of all that determines a stage's result: settings but those `without`, data, models, package version.

    Args:
        data: records of the datasets read, by role.
        models: fingerprints of the models and functions read, by role.
    """
    left_out = neutral_keys(run.settings.stage).union(without)
    values = {key: value for key, value in run.settings.changed().items() if key not in left_out}
    if world_size() > 1:  # the effective batch size scales with it
        values["processes"] = world_size()
    contents = {role: record["fingerprint"] for role, record in data.items()}
    return fingerprint({"stage": run.name, "values": values, "data": contents, "version": __version__, **models})


def finished(run: StageRun, digest: str) -> StageArtifact | None:
    """Record of the stage if it is finished and nothing that determines it has changed, else None.

    Checkpoints that a killed process left beside a finished stage are dropped.
    """
    if not (run.folder / STAGE_FILE).is_file():
        return None
    artifact = StageArtifact.load(run.folder)
    if artifact.fingerprint != digest:
        run.log("finished before, but its settings, data or earlier stages have changed: training again")
        return None
    if is_main() and owns_checkpoints(run, digest):
        drop_checkpoints(run)
    run.log(f"already finished and unchanged, skipped ({run.folder})")
    return artifact


def check_folder(run: StageRun) -> None:
    """Raise unless the stage's folder can be written; nothing is written for that.

    Raises:
        InstructGPTError: if there is no permission, or a file has its name.
    """
    if run.folder.exists() and not run.folder.is_dir():
        raise InstructGPTError(f"{run.folder}: is a file where the stage's folder goes; choose another --output_dir.")
    # `os.path.exists`, because `Path.exists` raises inside a folder that may not be searched.
    parents = (run.run_folder, *run.run_folder.absolute().parents)
    existing = next(path for path in parents if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "no permission" if existing.is_dir() else "is a file"
        raise InstructGPTError(
            f"{run.run_folder}: cannot be written ({existing}: {reason}); choose another --output_dir."
        )


def owns_checkpoints(run: StageRun, digest: str) -> bool:
    """Whether the checkpoint folder is that of a stage with exactly this fingerprint."""
    file = run.checkpoint_folder / FINGERPRINT_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == digest


def prepare_checkpoint_folder(run: StageRun, digest: str, keep: bool) -> None:
    """Create the checkpoint folder of a stage with the fingerprint `digest`; empty it first unless `keep`.

    Raises:
        InstructGPTError: if the folder cannot be written.
    """
    if is_main():
        try:
            if run.checkpoint_folder.exists() and not keep:
                shutil.rmtree(run.checkpoint_folder)
            run.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            (run.checkpoint_folder / FINGERPRINT_FILE).write_text(digest, encoding="utf-8")
        except OSError as error:
            raise InstructGPTError(
                f"{run.run_folder}: cannot be written ({error.strerror}); choose another --output_dir."
            ) from None
    barrier()


def finish(run: StageRun, artifact: StageArtifact, save_models: Callable[[Path], None]) -> StageArtifact:
    """Write models (`save_models` gets the folder) and stage.json in one step, then drop the checkpoints."""
    artifact.finished_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if is_main():
        with atomic_folder(run.folder) as folder:
            save_models(folder)
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
