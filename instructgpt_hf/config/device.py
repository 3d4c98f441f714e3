"""The number format that this machine computes natively, which TRL does not look up, and the number of processes."""

from __future__ import annotations

import os
from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]


def native_precision(use_cpu: bool = False) -> Precision:
    """The mixed precision of training unless the user sets one.

    CUDA devices that compute bfloat16 natively (Ampere and later, ROCm) use it. Older ones, such as the T4, emulate it
    slowly and use float16. Everything else trains in float32.
    """
    import torch

    if use_cpu or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def world_size() -> int:
    """Number of training processes, from the `WORLD_SIZE` that torchrun and accelerate set, else 1."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))
