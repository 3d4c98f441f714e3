"""How rollouts are generated, beyond what `trl.RLOOTrainer` sets up: transformers, continuous batching or vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from instructgpt_hf._compat.quirks import has_sharded_weights, set_vllm_weights
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.adapters import POLICY_ADAPTER
from instructgpt_hf.models.continuous import generate_batch
from instructgpt_hf.models.merging import merged_weights


def prepare_generation(trainer: Any) -> None:
    """Apply `min_completion_length`, and see that vLLM gets the policy's weights only.

    Args:
        trainer: a PPO trainer whose `actor_critic` is built.
    """
    shortest = trainer.args.min_completion_length
    if not trainer.use_vllm:
        if shortest:
            trainer.generation_config.min_new_tokens = shortest
            trainer.generation_kwargs["min_new_tokens"] = shortest
        return
    engine, policy = trainer.vllm_generation, trainer.actor_critic.policy
    # The engine would also stop at every EOS that the files of the policy's base declare.
    limits: dict[str, Any] = {"stop_token_ids": list(trainer.eos_token_ids), "ignore_eos": True}
    if shortest:
        limits["min_tokens"] = shortest
    engine.generation_kwargs = {**limits, **engine.generation_kwargs}
    engine.model = policy
    if not isinstance(policy, PeftModel):
        return
    sharded = trainer.is_fsdp_enabled or has_sharded_weights(policy)
    if sharded or not isinstance(policy.peft_config[POLICY_ADAPTER], LoraConfig):
        raise InstructGPTError("use_vllm: an adapter other than LoRA, or sharded over processes, cannot be sent.")
    set_vllm_weights(engine, functools.partial(merged_weights, policy))


def in_batches(
    generate: Callable[[list[list[int]]], list[list[int]]], prompt_ids: list[list[int]], size: int | None
) -> list[list[int]]:
    """Completions of batches of prompts of similar length, in the order of the prompts.

    Args:
        generate: completions of one batch.
        prompt_ids: token ids of every prompt.
        size: prompts in a batch; None makes one batch of all.
    """
    if size is None:
        return generate(prompt_ids)
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), reverse=True)
    results: list[list[int]] = [[] for _ in prompt_ids]
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        for row, completion in zip(rows, generate([prompt_ids[row] for row in rows]), strict=True):
            results[row] = completion
    return results


def generate_continuously(trainer: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Completions of a PPO trainer's policy by continuous batching, in the precision of its mixed-precision setting.

    Raises:
        InstructGPTError: if a request fails, or the policy's weights are sharded.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model_wrapped).policy
    if has_sharded_weights(policy):
        raise InstructGPTError("use_transformers_continuous_batching: needs each process to hold the whole policy.")
    args = trainer.args
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return generate_batch(policy, prompt_ids, trainer.generation_config, trainer.continuous_batching_config, dtype)
