"""Run a model over token lists: log-probabilities of continuations, evaluation mode, devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from instructgpt_hf.functional import token_log_probs


@contextlib.contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Evaluation mode inside, afterwards every module in the mode it was in; plain callables are left alone."""
    modules = [module for model in models if isinstance(model, torch.nn.Module) for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def model_device(model: Any) -> torch.device:
    """Device of a model's inputs; of a plain callable the CPU unless it has a `device`."""
    return torch.device(getattr(model, "device", "cpu"))


@torch.no_grad()
def continuation_log_probs(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probability of every token of every continuation, given its prompt and the tokens before it.

    Rows of similar length share a batch, padded on the right with a mask, so results do not depend on the tokenizer's
    padding side or on the batch size beyond rounding.

    Args:
        model: called with `input_ids` and `attention_mask` [B, T]; its output's `logits` are [B, T, V].
        prompt_ids: N lists of at least one token.
        completion_ids: N lists of at least one token.
        batch_size: sequences per forward pass.
        temperature: divides the logits.

    Returns:
        N float32 vectors on the CPU, one number per token, in nats.

    Raises:
        ValueError: if the numbers of prompts and completions differ or one of them is empty.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(f"Expected a completion for every prompt, got {len(completion_ids)} for {len(prompt_ids)}.")
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not prompt or not completion:
            raise ValueError(f"Row {row}: prompt and completion need at least one token each.")
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    device = model_device(model)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(rows[chosen[0]])
            ids = torch.tensor([rows[row] + [0] * (width - len(rows[row])) for row in chosen], device=device)
            lengths = torch.tensor([len(rows[row]) for row in chosen], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask).logits
            logps = token_log_probs(logits[:, :-1], ids[:, 1:], temperature).cpu()
            for place, row in enumerate(chosen):
                results[row] = logps[place, len(prompt_ids[row]) - 1 : len(rows[row]) - 1]
    return results
