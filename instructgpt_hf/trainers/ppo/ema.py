"""Exponential moving average of the policy's trainable weights (InstructGPT C.4: decay 0.992)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class WeightAverage(TrainerCallback):
    """Callback that keeps the average in float32 and updates it after every optimizer step.

    Args:
        parameters: the policy's trained parameters by name, the start of the average.
        decay: weight of the past, in (0, 1).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, parameters
        self.averages = {name: item.detach().float().clone() for name, item in parameters.items()}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Update the average with the new weights."""
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
        """Context in which the model has the averaged weights."""
        last = {name: item.detach().clone() for name, item in self.parameters.items()}
        self._set_weights(self.averages)
        try:
            yield
        finally:
            self._set_weights(last)

    @torch.no_grad()
    def _set_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, item in self.parameters.items():
            item.copy_(tensors[name])


@torch.no_grad()
def ema_update(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Update every average in place: `average = decay * average + (1 - decay) * param`.

    The paper does not say whether one update is one optimizer step, as here, or one iteration. Keep the averages in
    float32: in bfloat16 a step of 1 - 0.992 is below the rounding of most weights and is lost.

    Args:
        averages: floating point tensors, changed in place.
        params: as many tensors with the same shapes, else ValueError; dtype and device may differ.
        decay: in [0, 1], else ValueError; 0 copies, 1 keeps.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Expected a decay in [0, 1], got {decay}.")
    if [item.shape for item in averages] != [item.shape for item in params]:
        raise ValueError(f"Expected tensors of equal shapes, got {len(averages)} averages for {len(params)} params.")
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param.to(device=average.device, dtype=average.dtype), 1.0 - decay)
