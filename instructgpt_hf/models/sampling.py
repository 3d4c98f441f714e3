"""Sampling of completions for evaluation, the same way for every policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.models.decoding import generate
from instructgpt_hf.models.inputs import evaluation_mode, map_by_length, model_device, padded
from instructgpt_hf.models.vocabulary import Vocabulary


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
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """Sample one completion per prompt from the whole distribution (no top-k, no top-p, no repetition penalty).

    Returns N lists of token ids up to and with EOS, or of `max_new_tokens` tokens without EOS. The model's own
    generation settings are ignored, so that two policies are sampled alike. Modes and random state are restored. The
    result depends on the seed and, when sampling, on the batch size.

    Args:
        model: causal language model, whole or PEFT.
        tokenizer: for its padding id, and for the ids that have tokens; others have probability 0.
        prompt_ids: N lists of at least one token.
        eos_token_ids: each of them ends a completion.
        max_new_tokens: length of the longest completion.
        temperature: 0 is greedy decoding.
        seed: of the sampling.
        batch_size: prompts per batch.
        min_new_tokens: number of tokens before EOS is allowed.

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
        suppress_tokens=Vocabulary(tokenizer).others(model.config.get_text_config().vocab_size) or None,
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}),
    )
    device = model_device(model)

    def sample(prompts: list[Sequence[int]]) -> list[list[int]]:
        ids, mask = padded(prompts, tokenizer.pad_token_id, device, side="left")
        output = generate(model, input_ids=ids, attention_mask=mask, generation_config=config)
        return [_up_to_eos(tokens, eos_token_ids) for tokens in output[:, ids.shape[1] :].tolist()]

    with seeded(seed, device), evaluation_mode(model):
        return map_by_length(sample, prompt_ids, batch_size)


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's random state, of the CPU and a device, inside the block; None leaves it as it is."""
    if seed is None:
        yield
        return
    fork = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**fork):
        torch.manual_seed(seed)
        yield


def _up_to_eos(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in eos_token_ids), len(tokens))]


def is_finished(completion_ids: list[list[int]], eos_token_ids: Sequence[int]) -> list[bool]:
    """Whether each completion ends with an EOS token."""
    return [ids[-1] in eos_token_ids for ids in completion_ids]
