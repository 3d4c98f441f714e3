"""Generation of rollouts beyond what `trl.RLOOTrainer` sets up: transformers, continuous batching or vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from instructgpt_hf._compat.quirks import has_sharded_weights, set_vllm_weights
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.adapters import POLICY_ADAPTER
from instructgpt_hf.models.continuous import generate_batch
from instructgpt_hf.models.inputs import map_by_length
from instructgpt_hf.models.merging import merged_weights
from instructgpt_hf.trainers.ppo.rollouts import TokenLists


def prepare_vllm(
    engine: Any,
    policy: PreTrainedModel | PeftModel,
    min_completion_length: int,
    eos_token_ids: Sequence[int],
    excluded_ids: Sequence[int],
    sharded: bool,
) -> None:
    """Let vLLM stop at `eos_token_ids` only, and send it the policy's weights, with LoRA merged.

    Args:
        engine: TRL's `VLLMGeneration`.
        policy: without the value model.
        min_completion_length: tokens before EOS may come.
        eos_token_ids: tokens that end a completion.
        excluded_ids: ids that are no token's.
        sharded: whether the Trainer shards weights over processes; an adapter is then an InstructGPTError.
    """
    # The engine would also stop at every EOS that the files of the policy's base declare.
    limits: dict[str, object] = {"stop_token_ids": list(eos_token_ids), "ignore_eos": True}
    if min_completion_length:
        limits["min_tokens"] = min_completion_length
    if excluded_ids:  # the lowest that vLLM takes, e**-100 times as likely
        limits["logit_bias"] = dict.fromkeys(excluded_ids, -100.0)
    engine.generation_kwargs = {**limits, **engine.generation_kwargs}
    engine.model = policy
    if not isinstance(policy, PeftModel):
        return
    lora = isinstance(policy.peft_config[POLICY_ADAPTER], LoraConfig)
    if sharded or has_sharded_weights(policy) or not lora:
        raise InstructGPTError("use_vllm: an adapter other than LoRA, or sharded over processes, cannot be sent.")
    set_vllm_weights(engine, functools.partial(merged_weights, policy))


def in_batches(generate: Callable[[TokenLists], TokenLists], prompt_ids: TokenLists, size: int | None) -> TokenLists:
    """Completions by `generate` of batches of `size` prompts of similar length (None: of all), in order of prompts."""
    if size is None:
        return generate(prompt_ids)
    return map_by_length(generate, prompt_ids, size)


def generate_continuously(
    policy: PreTrainedModel | PeftModel,
    prompt_ids: TokenLists,
    generation_config: GenerationConfig,
    batching_config: ContinuousBatchingConfig,
    args: PPOConfig,
    seed: int,
) -> TokenLists:
    """Completions by continuous batching, in the precision of the mixed-precision setting, drawn from `seed`.

    Raises:
        InstructGPTError: if a request fails, or the policy's weights are sharded.
    """
    if has_sharded_weights(policy):
        raise InstructGPTError("use_transformers_continuous_batching: needs each process to hold the whole policy.")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return generate_batch(policy, prompt_ids, generation_config, batching_config, dtype, seed)
