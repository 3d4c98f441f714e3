"""What one of several training processes does for all. Processes come from torchrun or `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState

from instructgpt_hf.config.device import world_size

_left = False


def is_main() -> bool:
    """Whether this process writes the run's folder and speaks to the user."""
    return int(os.environ.get("RANK") or 0) == 0


def wait() -> None:
    """Go on once every process has come here, unless they have parted."""
    if world_size() > 1 and not _left:
        PartialState().wait_for_everyone()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others, which then find what it wrote."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def any_process(value: bool) -> bool:
    """Whether `value` is true on one process at least; every process must ask."""
    if world_size() == 1 or _left:
        return value
    found = torch.tensor([float(value)], device=PartialState().device)
    torch.distributed.all_reduce(found)
    return bool(found.item())


def leave() -> None:
    """Part: training is over, and what follows is up to the main process, for as long as it takes."""
    global _left
    if torch.distributed.is_initialized():
        wait()
        torch.distributed.destroy_process_group()
        _left = True


def whole_weights(trainer: Any) -> dict[str, Any] | None:
    """The weights of a model that FSDP or ZeRO-3 splits, on the main process; None where no process lacks any.

    Every process must ask.
    """
    if not shards_weights(trainer.args):
        return None
    weights: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def shards_weights(args: Any) -> str | None:
    """What splits the weights over the processes: FSDP, DeepSpeed ZeRO-3, or None."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    plugin = args.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else None
