"""Which of several training processes does what. Processes come from torchrun or `accelerate launch`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import Trainer, TrainingArguments

_left = False


def is_main() -> bool:
    """Whether this process writes the run's folder and logs for the user."""
    return bool(PartialState().is_main_process)


def barrier() -> None:
    """Barrier over all processes; no-op after `leave()`."""
    if not _left:
        PartialState().wait_for_everyone()


def main_first() -> AbstractContextManager[None]:
    """Run the block on the main process first; the others then find what it wrote."""
    return nullcontext() if _left else PartialState().main_process_first()


def any_process(value: bool) -> bool:
    """Whether `value` is true on at least one process. Every process must call it."""
    state = PartialState()
    if state.num_processes == 1 or _left:
        return value
    return bool(reduce(torch.tensor([float(value)], device=state.device), "sum").item())


def leave() -> None:
    """Destroy the process group; only the main process does further work."""
    global _left
    if torch.distributed.is_initialized():
        barrier()
        PartialState().destroy_process_group()
        _left = True


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Gathered weights of a model that FSDP or ZeRO-3 shards, on the main process; None where nothing is sharded.

    Every process must call it.
    """
    if not shards_weights(trainer.args):
        return None
    weights: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def shards_weights(training_args: TrainingArguments) -> str | None:
    """Name of what shards the weights over the processes, FSDP or DeepSpeed ZeRO-3, or None."""
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    plugin: Any = training_args.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else None
