"""Run a trainer to its end: progress on the terminal, and a stop from which the next run resumes."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import has_length

from instructgpt_hf._compat.quirks import remove_progress_displays
from instructgpt_hf.config.device import world_size
from instructgpt_hf.errors import Interrupted, end_worker
from instructgpt_hf.metric_register import terminal_values
from instructgpt_hf.models.inputs import watch_batches
from instructgpt_hf.stages.lifecycle import IDENTITY_FILE
from instructgpt_hf.stages.output import Phase
from instructgpt_hf.stages.processes import any_process
from instructgpt_hf.stages.run import StageRun

SECONDS_OF_AN_ECHO = 5  # between a signal and the same one from the launcher


class ShowProgress(TrainerCallback):
    """Shows how far training and each evaluation are, instead of the Trainer's bars and printed dictionaries.

    Args:
        training: the phase of the training.
    """

    def __init__(self, run: StageRun, training: Phase) -> None:
        self.run, self.training = run, training
        self.evaluation: tuple[contextlib.ExitStack, Phase] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps; a resumed run has some behind it."""
        self.training.begin(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step."""
        self.training.at(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest metrics."""
        if shown := terminal_values(logs or {}):
            self.training.latest = "  ".join(shown)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count a batch of held-back rows; the first one begins the phase."""
        if self.evaluation is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            stack = contextlib.ExitStack()
            phase = stack.enter_context(self.run.phase("measuring held-back rows", total, "batches"))
            self.evaluation = stack, phase
        phase = self.evaluation[1]
        phase.at(phase.done + 1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the phase of the evaluation."""
        if self.evaluation is not None:
            self.evaluation[0].close()
            self.evaluation = None

    on_predict = on_evaluate


class StopAtCheckpoint(TrainerCallback):
    """Turns the first Ctrl-C or SIGTERM inside its block into a checkpoint and a clean end; a second stops at once.

    Args:
        boundary: optimizer steps between the points at which the stage can resume.
    """

    def __init__(self, run: StageRun, boundary: int) -> None:
        self.run, self.boundary = run, boundary
        self.requested, self.signal, self.since = False, signal.SIGINT, 0.0

    def __enter__(self) -> StopAtCheckpoint:
        self.previous: dict[int, Any] = {}
        self.process = os.getpid()
        with contextlib.suppress(ValueError):  # not the main thread, which alone may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame: Any) -> None:
        if os.getpid() != self.process:  # a worker; of Ctrl-C, which reaches it too, it hears from this process
            end_worker(self.process, number)
            return
        if self.requested:
            # A launcher passes on what a terminal or scheduler has sent to all processes.
            if world_size() == 1 or time.monotonic() - self.since > SECONDS_OF_AN_ECHO:
                raise Interrupted(number)
            return
        self.requested, self.signal, self.since = True, signal.Signals(number), time.monotonic()
        self.run.log(
            f"{self.signal.name}: stopping at the next point it can resume from; a second one, such as Ctrl-C again, "
            "stops at once, and the same command resumes either way"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop once requested, at the next boundary; save no checkpoint at the last step.

        The models of the last step go into the stage's folder. Resuming from a checkpoint of it would train on.
        """
        boundary = state.global_step % self.boundary == 0 and state.global_step < state.max_steps
        if boundary and any_process(self.requested):
            self.requested = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # after which save_strategy: best would decide whether to save
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save no checkpoint at the last step."""
        if state.global_step >= state.max_steps:
            control.should_save = False


def train(trainer: Trainer, run: StageRun, checkpoint: Path | None = None, boundary: int = 1) -> dict[str, Any]:
    """Train to the end, from `checkpoint` if there is one.

    Args:
        boundary: optimizer steps between the points at which the trainer can resume.

    Returns:
        `steps`, `epochs`, `seconds` and the log, for stage.json.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the stage can be resumed.
    """
    if checkpoint is not None:
        run.log(f"resuming the interrupted stage from step {checkpoint.name.rsplit('-', 1)[1]}")
    _match_precision(trainer)
    trainer.args.run_name = trainer.args.run_name or _tracker_name(run)
    _keep_events(trainer, run)
    # Each checkpoint says whose it is.
    trainer.checkpoint_files = {IDENTITY_FILE: (run.checkpoint_folder / IDENTITY_FILE).read_text(encoding="utf-8")}
    remove_progress_displays(trainer)
    with (
        run.phase("training", unit="steps") as phase,
        watch_batches(functools.partial(_show_sampling, phase)),
        StopAtCheckpoint(run, boundary) as stop,
    ):
        trainer.add_callback(ShowProgress(run, phase))
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(stop.signal)
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": next((record["train_runtime"] for record in reversed(history) if "train_runtime" in record), None),
        "log": history,
    }


def _show_sampling(phase: Phase, done: int, total: int) -> None:
    """Show how many of an iteration's completions are sampled: all that a trainer maps by length."""
    phase.part = f"sampling {done}/{total}" if done < total else ""


def _tracker_name(run: StageRun) -> str:
    """Name of this training of the stage for trackers, kept when it resumes: trackio appends to a name it knows."""
    file = run.checkpoint_folder / "started"
    if not file.is_file():
        file.write_text(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"), encoding="utf-8")
    return f"{run.recipe}-{run.name}-{file.read_text(encoding='utf-8')}"


def _keep_events(trainer: Trainer, run: StageRun) -> None:
    """Let TensorBoard's files outlive the checkpoint folder, in `tensorboard/` of the run."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(run.events_folder)


def _match_precision(trainer: Trainer) -> None:
    """Keep trained weights in float32 unless training runs in bfloat16.

    A model loaded in half precision has trained weights in it, which the gradient scaler of float16 refuses.
    """
    if trainer.args.bf16:
        return
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
