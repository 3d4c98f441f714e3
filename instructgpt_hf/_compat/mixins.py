"""Behaviour of the Trainer that this package's trainers change alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from instructgpt_hf._compat.checkpoints import WholeCheckpoints


class CommonChanges(WholeCheckpoints):
    """Whole checkpoints, no model card from TRL, private repositories, and an end without a deadlock.

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
    _metrics: dict[str, dict[str, list[float]]]

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
