"""Generation by transformers' continuous batching: rows that end make room for prompts that wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from instructgpt_hf.errors import InstructGPTError


def generate_batch(
    policy: Any,
    prompt_ids: list[list[int]],
    generation_config: Any,
    batching_config: Any = None,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """One completion per prompt.

    The requests are served by a thread in the order in which it finds them, so sampling with a seed need not give the
    same tokens twice.

    Args:
        policy: causal language model, whole or PEFT.
        prompt_ids: N lists of at least one token.
        generation_config: EOS ids, `max_new_tokens`, temperature, ...
        batching_config: transformers' `ContinuousBatchingConfig`; by default the cache takes most of the free memory
            while this runs.
        dtype: half precision to generate in; the weights come back bit by bit. None generates in their own.

    Returns:
        N lists of token ids, up to and with EOS, in the order of the prompts.

    Raises:
        InstructGPTError: if a request fails, with the reason; transformers itself only logs it.
    """
    training = policy.training
    try:
        with _weights_in(policy, dtype):
            outputs = policy.generate_batch(
                prompt_ids,
                generation_config=generation_config,
                continuous_batching_config=batching_config,
                progress_bar=False,
            )
    finally:
        policy.train(training)
    results = list(outputs.values())
    failed = [str(item.error) for item in results if item.error is not None]
    if failed or [list(item.prompt_ids) for item in results] != [list(ids) for ids in prompt_ids]:
        reason = failed[0] if failed else f"{len(results)} of {len(prompt_ids)} prompts were answered"
        raise InstructGPTError(
            f"use_transformers_continuous_batching: {reason}; with a smaller max_memory_percent in "
            "transformers_continuous_batching_config, or without it, generation may work."
        )
    return [list(item.generated_tokens) for item in results]


@contextlib.contextmanager
def _weights_in(model: torch.nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Round the floating weights for the length of the block, and put the very same tensors back.

    Autocast, in which the other backends generate, does not reach the thread that generates here, and the cache has
    the weights' precision.
    """
    kept = [
        (item, item.data)
        for item in model.parameters()
        if dtype is not None and item.dtype != dtype and item.dtype.is_floating_point
    ]
    for item, data in kept:
        item.data = data.to(dtype)
    try:
        yield
    finally:
        for item, data in kept:
            item.data = data
