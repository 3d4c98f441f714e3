"""The skeleton of every stage: the order of checking, loading, training and writing, in one place."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from transformers import Trainer

from instructgpt_hf._compat.quirks import own_tracker_run
from instructgpt_hf.artifacts import StageArtifact, fingerprint
from instructgpt_hf.data.sources import Sources
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages import lifecycle, resume
from instructgpt_hf.stages.fit import train
from instructgpt_hf.stages.identity import stage_identity
from instructgpt_hf.stages.inputs import show_loading_progress
from instructgpt_hf.stages.run import StageRun


class StageInputs(Protocol):
    """Models and data that a stage reads; each stage has a class of its own."""

    @property
    def largest(self) -> Path:
        """Folder of the largest model to load, for the progress bar."""


Inputs = TypeVar("Inputs", bound=StageInputs)
Rows = TypeVar("Rows")
Models = TypeVar("Models")


class Outcome(NamedTuple):
    """Result of a trained stage.

    Attributes:
        record: fields of `StageArtifact` that only this stage fills in.
        save: writes the models into a folder.
        summary: one line for the user.
    """

    record: dict[str, Any]
    save: Callable[[Path], None]
    summary: str


class Stage(abc.ABC, Generic[Inputs, Rows, Models]):
    """One stage: what it reads, loads, trains and records. `train_stage` calls the methods in the order below.

    `read` and `prepare` raise `InstructGPTError` for anything unusable before a model is loaded. The methods write
    nothing but the lab's data files; `Outcome.save` writes into the folder it is given.

    Args:
        run: the stage's identity.
    """

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self.sources = Sources(run.lab_folder)

    @abc.abstractmethod
    def read(self) -> Inputs:
        """Find models, earlier stages and datasets."""

    @abc.abstractmethod
    def fingerprints(self, inputs: Inputs) -> dict[str, Any]:
        """Fingerprints of the models and functions that determine the result, by role."""

    @abc.abstractmethod
    def prepare(self, inputs: Inputs) -> Rows:
        """Tokenize the data and hold lengths against limits."""

    @abc.abstractmethod
    def load(self, inputs: Inputs) -> Models:
        """Load the models."""

    @abc.abstractmethod
    def trainer(self, inputs: Inputs, rows: Rows, models: Models) -> Trainer:
        """Build the trainer, which writes checkpoints only."""

    def boundary(self) -> int:
        """Optimizer steps between the points at which the trainer can resume."""
        return 1

    @abc.abstractmethod
    def conclude(
        self, inputs: Inputs, rows: Rows, models: Models, trainer: Trainer, training: dict[str, Any]
    ) -> Outcome:
        """Measure the trained models."""


@own_tracker_run()
def train_stage(stage: Stage[Any, Any, Any]) -> StageArtifact:
    """Train a stage, or find it finished.

    Nothing is written before every check has passed and the models are loaded, apart from the lab's data files.

    Returns:
        The stage's record, which stands in its folder as stage.json.

    Raises:
        InstructGPTError: if data, models or settings are unusable, or training was stopped.
        Interrupted: if the user pressed Ctrl-C; the same call resumes.
    """
    run, training_args = stage.run, stage.run.settings.training_args
    lifecycle.check_launch(training_args, run.settings.stage)
    # The finished stage is pushed as a whole; the Trainer would create a repository of its own and push checkpoints.
    training_args.output_dir, training_args.push_to_hub = str(run.checkpoint_folder), False

    with run.phase("finding models, reading data", bar=False):
        inputs = stage.read()
        models_read, data = stage.fingerprints(inputs), stage.sources.records
    identity = stage_identity(run, data, models_read)
    if (done := lifecycle.finished(run, identity)) is not None:
        return done
    with run.phase("tokenizing", bar=False):
        rows = stage.prepare(inputs)
    lifecycle.check_folder(run)
    start = resume.find_resume(run, identity)
    run.open_log()

    show_loading_progress(inputs.largest)
    with run.phase("loading models", bar=False):
        models = stage.load(inputs)
    lifecycle.prepare_checkpoint_folder(run, identity, start.source, start.reason)
    resume.record_changes(run, start)
    with run.phase("preparing training", bar=False):
        trainer = stage.trainer(inputs, rows, models)
    try:
        training = train(trainer, run, resume.open_checkpoint(run, start.step), stage.boundary())
    except InstructGPTError as stop:
        raise resume.record_stop(run, stop) from stop
    if changes := resume.recorded_changes(run):
        training["changed_settings"] = changes

    outcome = stage.conclude(inputs, rows, models, trainer, training)
    artifact = lifecycle.stage_record(run, fingerprint(identity), data, training=training, **outcome.record)
    run.result(outcome.summary)
    with run.phase("saving", bar=False):
        return lifecycle.finish(run, artifact, outcome.save)
