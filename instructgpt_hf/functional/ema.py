"""Exponential moving average of weights (InstructGPT C.4: decay 0.992)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Move every average in place: `average = decay * average + (1 - decay) * param`.

    The paper does not say whether one update is one optimizer step or one iteration. Keep the averages in float32:
    in bfloat16 a step of 1 - 0.992 is below the rounding of most weights and is lost.

    Args:
        averages: floating point tensors, changed in place.
        params: as many tensors with the same shapes; dtype and device may differ.
        decay: in [0, 1]; 0 copies, 1 keeps.

    Raises:
        ValueError: if the lists or the shapes do not match, or decay is outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Expected a decay in [0, 1], got {decay}.")
    if [item.shape for item in averages] != [item.shape for item in params]:
        raise ValueError(f"Expected tensors of equal shapes, got {len(averages)} averages for {len(params)} params.")
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param.to(device=average.device, dtype=average.dtype), 1.0 - decay)
