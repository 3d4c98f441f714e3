"""What a resumed run takes up again beside weights, optimizer and random numbers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class ContinueLog(TrainerCallback):
    """Gives the log of a resumed run what the run before had measured and not logged yet.

    Args:
        trainer: an `OnPolicyTrainer`.
        unlogged: what its `unlogged` gave.
    """

    def __init__(self, trainer: Any, unlogged: dict[str, Any]) -> None:
        self.trainer = trainer
        self.unlogged: dict[str, Any] | None = unlogged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once: the Trainer has set up sums of its own just before."""
        if self.unlogged is not None:
            self.trainer.restore_unlogged(self.unlogged)
        self.unlogged = None
