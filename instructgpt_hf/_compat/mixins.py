"""Behaviour of the Trainer that this package's trainers change alike."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from instructgpt_hf._compat.checkpoints import WholeCheckpoints

RECORDS_FILE = "records.json"


@dataclass(eq=False)
class AtTrainBegin(TrainerCallback):
    """Callback that does something once, when training begins and the Trainer has set its sums to zero."""

    action: Callable[[], None] | None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Do it at the first call."""
        if self.action is not None:
            self.action()
        self.action = None


class WholeRecords(WholeCheckpoints):
    """Records of a resumed training that cover all of its steps, not only those since it was resumed.

    Cause: the Trainer sums losses and time, TRL metrics and tokens since the process began; a checkpoint has none.
    Goes when: the Trainer restores them from a checkpoint, or logs at every checkpoint.
    Relies on: `contracts.LOOP_ATTRIBUTES` and `contracts.SUPERVISED_ATTRIBUTES`; the checkpoint's optimizer being read
        before `on_train_begin`; rates of the last log being those of this process.
    """

    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _seconds_before = 0.0
    _steps_before = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does."""
        self._seconds_before, self._steps_before, self._began = 0.0, 0, time.monotonic()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def files_of_checkpoint(self) -> dict[str, str]:
        """Also the records since the last log."""
        return super().files_of_checkpoint() | {RECORDS_FILE: json.dumps(self._records())}

    def _records(self) -> dict[str, Any]:
        # Its mean over all processes is what will be logged.
        loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().item()
        return {
            "metrics": dict(self._metrics["train"]),
            "loss": {"sum": loss, "total": self._total_loss_scalar, "step": self._globalstep_last_logged},
            "tokens": getattr(self, "_total_train_tokens", None),
            "seconds": self._seconds_before + time.monotonic() - self._began,
            "steps": self.state.global_step,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        file = Path(checkpoint or "") / RECORDS_FILE
        if checkpoint is not None and file.is_file():
            records = json.loads(file.read_text(encoding="utf-8"))
            self.add_callback(AtTrainBegin(partial(self._restore_records, records)))  # type: ignore[attr-defined]

    def _restore_records(self, records: dict[str, Any]) -> None:
        for name, values in records["metrics"].items():
            self._metrics["train"][name] = list(values)
        self._tr_loss += records["loss"]["sum"]
        self._total_loss_scalar, self._globalstep_last_logged = records["loss"]["total"], records["loss"]["step"]
        if records["tokens"] is not None:
            self._total_train_tokens = records["tokens"]
        self._seconds_before, self._steps_before = records["seconds"], records["steps"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log; the last one of a resumed training is about the whole of it."""
        if "train_runtime" in logs and self._steps_before:
            steps, seconds = self.state.global_step, logs["train_runtime"]
            whole = self._seconds_before + seconds
            logs["train_runtime"] = round(whole, 4)
            logs["train_loss"] = self._total_loss_scalar / steps
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs and steps > self._steps_before:
                    logs[name] = round(logs[name] * seconds / whole * steps / (steps - self._steps_before), 3)
        super().log(logs, start_time)  # type: ignore[misc]


class CommonChanges(WholeRecords):
    """Whole checkpoints and records, no model card from TRL, private repositories, and an end without a deadlock.

    Cause: TRL's trainers write a model card into every checkpoint; `Trainer.init_hf_repo` creates a repository with
        `private=None`, which is public; DDP's reducer holds the process group, and where it outlives
        `destroy_process_group` (torch 2.13) it destroys the group with Python's lock taken: torch then waits for the
        group's thread, and that thread for the lock to free a tensor.
    Goes when: TRL has a switch for its card, transformers has private repositories by default, and torch's reducer
        releases the process group; each method on its own.
    Relies on: the Trainer calling `create_model_card`, `init_hf_repo` and `end`, and nothing else holding the wrapper.
    """

    args: TrainingArguments
    model: nn.Module
    model_wrapped: nn.Module

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def replace_recorded(self, metrics: dict[str, float]) -> None:
        """Replace values recorded since the last log by one for each metric."""
        recorded = self._metrics["train" if self.model.training else "eval"]
        recorded.update({name: [value] for name, value in metrics.items()})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing, at every checkpoint; the card is written from stage.json."""

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository to push to, private unless `hub_private_repo` or the call says otherwise."""
        # Through the setting, because not every supported version has the parameter `private`.
        self.args.hub_private_repo = self.args.hub_private_repo is not False
        super().init_hf_repo(*args, **kwargs)  # type: ignore[misc]

    def end(self) -> None:
        """Release the wrapped model, then do what the Trainer does at the end."""
        self.model_wrapped = self.model
        super().end()  # type: ignore[misc]


class SeveralBackwards:
    """Several backward passes in one step of the training loop.

    Cause: accelerate decides once per batch of the dataloader whether gradients are synchronised. With two backward
        passes DDP would synchronise twice, and DeepSpeed would take the optimizer step after the first one.
    Goes when: `Accelerator.no_sync` also holds for DeepSpeed.
    Relies on: `GradientState._set_sync_gradients` being what `accelerator.backward` and the Trainer read.
    """

    accelerator: Accelerator

    @contextlib.contextmanager
    def without_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """Context whose backward passes only accumulate this process's gradients; another pass follows in the step."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)
