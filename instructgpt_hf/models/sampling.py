"""Sampling of completions for evaluation, the same way for every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.models.decoding import generate
from instructgpt_hf.models.inputs import evaluation_mode, model_device


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """Sample one completion per prompt from the whole distribution (no top-k, no top-p, no repetition penalty).

    The model's own generation settings are ignored, so that two policies are sampled alike. Completions that have
    ended cost no further decoding steps. The modules' modes and the random state are restored. The result depends on
    the seed and, when sampling, on the batch size.

    Args:
        model: a transformers or PEFT causal language model.
        tokenizer: for its padding id.
        prompt_ids: N lists of at least one token, already rendered.
        eos_token_ids: each of them ends a completion.
        max_new_tokens: length of the longest completion.
        temperature: 0 is greedy decoding.
        seed: sampling seed.
        batch_size: prompts per batch; prompts of similar length share one, padded on the left.
        progress: called with the number of finished prompts after every batch.
        min_new_tokens: number of tokens before EOS is allowed.

    Returns:
        N lists of token ids up to and with EOS, or of `max_new_tokens` tokens without EOS.

    Raises:
        ValueError: if a prompt is empty, there is no EOS or padding id, or the temperature is negative.
    """
    if temperature < 0:
        raise ValueError(f"Expected a temperature >= 0, got {temperature}.")
    if not eos_token_ids or tokenizer.pad_token_id is None:
        raise ValueError("Expected at least one EOS token id and a tokenizer with a padding token.")
    empty = [row for row, ids in enumerate(prompt_ids) if not ids]
    if empty:
        raise ValueError(f"Prompt {empty[0]} is empty: {len(empty)} of {len(prompt_ids)} prompts have no token.")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        eos_token_id=list(eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}),
    )
    device = model_device(model)
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), reverse=True)
    results: list[list[int]] = [[] for _ in prompt_ids]
    devices = [device] if device.type != "cpu" else []
    fork = {"device_type": device.type} if devices else {}
    with torch.random.fork_rng(devices=devices, **fork), evaluation_mode(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(prompt_ids[rows[0]])
            missing = [width - len(prompt_ids[row]) for row in rows]
            ids = [[tokenizer.pad_token_id] * gap + [*prompt_ids[row]] for row, gap in zip(rows, missing, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in missing]
            output = generate(
                model,
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )
            for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
                results[row] = _up_to_eos(tokens, eos_token_ids)
            if progress is not None:
                progress(len(rows))
    return results


def _up_to_eos(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return tokens[:end]


def is_finished(completion_ids: list[list[int]], eos_token_ids: Sequence[int]) -> list[bool]:
    """Whether each completion ends with an EOS token."""
    return [ids[-1] in eos_token_ids for ids in completion_ids]
