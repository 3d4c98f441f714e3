"""Generation by transformers' continuous batching, in which ended rows make room for waiting prompts."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from instructgpt_hf._compat.quirks import rounded_weights
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.sampling import seeded


def generate_batch(
    policy: PreTrainedModel | PeftModel,
    prompt_ids: list[list[int]],
    generation_config: GenerationConfig,
    batching_config: ContinuousBatchingConfig | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Sample one completion per prompt: N lists of token ids, up to and with EOS.

    Args:
        policy: causal language model, whole or PEFT.
        prompt_ids: N lists of at least one token.
        generation_config: EOS ids, `max_new_tokens`, temperature, ...
        batching_config: by default the cache takes most of the free memory while generation runs.
        dtype: half precision to generate in; the weights are restored bit by bit. None generates in their own dtype.
        seed: of the sampling; the random state is restored. None takes the state as it is.

    Raises:
        InstructGPTError: if a request fails, with the reason; transformers itself only logs it.
    """
    training = policy.training
    try:
        with rounded_weights(policy, dtype), seeded(seed, policy.device):
            options = {"generation_config": generation_config, "continuous_batching_config": batching_config}
            results = list(policy.generate_batch(prompt_ids, **options, progress_bar=False).values())
    finally:
        policy.train(training)
    failed = [str(item.error) for item in results if item.error is not None]
    if failed or [list(item.prompt_ids) for item in results] != [list(ids) for ids in prompt_ids]:
        reason = failed[0] if failed else f"{len(results)} of {len(prompt_ids)} prompts have a completion"
        raise InstructGPTError(
            f"use_transformers_continuous_batching: {reason}; with a smaller max_memory_percent in "
            "transformers_continuous_batching_config, or without it, generation may work."
        )
    return [list(item.generated_tokens) for item in results]
