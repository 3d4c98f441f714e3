"""Exponential moving average of the policy's trainable weights (InstructGPT C.4: decay 0.992)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from instructgpt_hf.functional import ema_update


class WeightAverage(TrainerCallback):
    """Keeps the average in float32, updated after every optimizer step.

    The paper does not state whether it averages per minibatch or per iteration; here it is per optimizer step.

    Args:
        parameters: the policy's trained parameters by name; they start the average.
        decay: weight of the past, in (0, 1).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.averages = {name: item.detach().float().clone() for name, item in self.parameters.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fold the new weights in."""
        ema_update(list(self.averages.values()), list(self.parameters.values()), self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name, for a checkpoint."""
        return {name: item.contiguous() for name, item in self.averages.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's average."""
        for name, average in self.averages.items():
            average.copy_(tensors[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights, for the length of the block."""
        with torch.no_grad():
            last = {name: item.detach().clone() for name, item in self.parameters.items()}
            for name, item in self.parameters.items():
                item.copy_(self.averages[name])
            try:
                yield
            finally:
                for name, item in self.parameters.items():
                    item.copy_(last[name])
