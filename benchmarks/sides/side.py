"""A side's process: `python sides/ours.py JOB` or `PEER_PYTHON sides/peer.py JOB`, JOB a file with a `Job`.

It builds its trainer, starts `train()`, and stops inside it after every iteration until it reads a line, so that
iterations of the two sides can take turns. It reports on standard output, one line of JSON for each iteration. Runs in
both environments, so it needs torch and transformers only.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from common.memory import PeakMemory, now
from torch.nn import Parameter
from transformers import Trainer, TrainerCallback

from sides.job import Job

# Compared metrics.
SCALARS = ("kl", "policy_loss", "value_loss")
Samples = list[tuple[list[int], list[int]]]


class Side(ABC):
    """One of the two trainers; the subclasses build it and reach into it.

    Attributes:
        scalars: the trainer's names of the metrics `SCALARS`.
    """

    scalars: tuple[str, str, str]

    @abstractmethod
    def build(self, job: Job, folder: str) -> Trainer:
        """The trainer on the job's models and prompts."""

    @abstractmethod
    def keep_samples(self, trainer: Trainer) -> list[Samples]:
        """A list to which sampled prompts and completions are added, call by call, from now on."""

    @abstractmethod
    def train_on_stored(
        self, trainer: Trainer, job: Job
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]], list[int]]:
        """Train on the job's completions with a moved policy.

        Returns:
            Tensors of the rollout, a row for each completion; the gradients of every step; and the number of each
            row's completion in the job.
        """

    def check(self, job: Job, folder: str) -> None:
        """Take two steps on the stored completions and write the quantities to compare to `job.record`."""
        trainer, metrics = self.build(job, folder), Metrics()
        trainer.add_callback(metrics)
        tensors, steps, order = self.train_on_stored(trainer, job)
        back = torch.tensor(order).argsort()
        compared = {
            "tensors": {name: item.float().cpu()[back] for name, item in tensors.items()},
            "scalars": {name: metrics.logged[key] for name, key in zip(SCALARS, self.scalars, strict=True)},
            "steps": steps,
        }
        torch.save(compared, job.record)

    def main(self) -> None:
        """Compare stored completions, or iterate in turns."""
        channel, job = Channel(), Job.read(sys.argv[1])
        memory = PeakMemory(job.cuda)
        memory.start()
        with tempfile.TemporaryDirectory() as folder:
            if job.checks:
                self.check(job, folder)
                channel.write({"done": True})
                return
            trainer = self.build(job, folder)
            trainer.add_callback(Turns(channel, job, memory, self.keep_samples(trainer)))
            trainer.train()


class Channel:
    """The process's standard output, for lines of JSON only; other output goes to standard error."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def write(self, report: dict[str, Any]) -> None:
        """One line."""
        self.file.write(json.dumps(report) + "\n")
        self.file.flush()


class Turns(TrainerCallback):
    """Stops the training after every iteration until the parent process asks for the next one.

    Args:
        channel: for the reports.
        job: the side's work.
        memory: with the process's memory after imports as baseline.
        sampled: prompts and completions of the iteration's calls; cleared after each iteration.
    """

    def __init__(self, channel: Channel, job: Job, memory: PeakMemory, sampled: list[Samples]) -> None:
        self.channel = channel
        self.job = job
        self.memory = memory
        self.sampled = sampled
        self.started = self.processor_started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the memory of the loaded models."""
        self.channel.write({"held_mib": self.memory.held_mib(), "loading_mib": self.memory.peak_mib()})
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report an iteration: both trainers log once, at its end."""
        seconds, processor_seconds = now(self.memory.cuda) - self.started, time.process_time() - self.processor_started
        samples = list(itertools.chain.from_iterable(self.sampled))
        if len(samples) != self.job.episodes:
            raise RuntimeError(f"{len(samples)} episodes in an iteration of {self.job.episodes}")
        report = {
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "peak_mib": self.memory.peak_mib(),
            "held_mib": self.memory.held_mib(),
            "mean_length": sum(len(completion) for _, completion in samples) / len(samples),
            "score": logs["objective/scores"],
            "kl": logs["objective/kl"],
        }
        if self.job.samples:
            report["samples"] = samples
        self.sampled.clear()
        self.channel.write(report)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the parent process needs no further iteration
        self.memory.reset()
        self.processor_started = time.process_time()
        self.started = now(self.memory.cuda)


class Metrics(TrainerCallback):
    """Keeps the logged metrics."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One iteration, or the summary of the run."""
        self.logged.update(logs)


@torch.no_grad()
def move_policy(parameters: Iterable[Parameter], train: str) -> None:
    """Scale the policy's trained weights, so that it differs by a few nats from the reference copied from it."""
    for parameter in parameters:
        parameter.mul_(1.02 if train == "full" else 1.5)


def record(owner: Any, name: str, keep: Callable[[tuple[Any, ...], Any], Any]) -> list[Any]:
    """A list to which `keep(arguments, result)` is added in every call of a function from now on.

    Args:
        owner: trainer, optimizer or module whose function is replaced.
        name: of the function.
        keep: selects what is kept, so that no large tensor stays in memory.
    """
    kept: list[Any] = []
    function = getattr(owner, name)

    def call_and_keep(*arguments: Any, **settings: Any) -> Any:
        result = function(*arguments, **settings)
        kept.append(keep(arguments, result))
        return result

    setattr(owner, name, call_and_keep)
    return kept


def gradients(roles: dict[str, dict[str, Parameter]]) -> dict[str, torch.Tensor]:
    """Gradients by role and by names that do not depend on the model's wrappers.

    Args:
        roles: under `policy` and `value_model` the trained parameters by name.
    """
    return {
        f"{role}.{plain_name(name)}": parameter.grad.detach().float().cpu().clone()
        for role, parameters in roles.items()
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }


def plain_name(name: str) -> str:
    """A parameter's name without roles, the wrappers of PEFT, and the names of adapters."""
    wrappers = ("policy", "value_model", "base_model", "model", "default", "modules_to_save")
    return ".".join(part for part in name.split(".") if part not in wrappers)
