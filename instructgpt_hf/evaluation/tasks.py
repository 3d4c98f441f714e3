"""Accuracy on few-shot pretraining tasks by greedy generation: InstructGPT's alignment tax (App. D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.data.special_text import encode_text
from instructgpt_hf.evaluation.intervals import Estimate, wilson
from instructgpt_hf.models.sampling import sample_completions


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping[str, Any]],
    max_new_tokens: int = 12,
    batch_size: int = 64,
) -> tuple[Estimate, dict[str, Estimate], list[bool]]:
    """Share of few-shot questions whose greedy completion, up to the first newline, is the right option.

    Args:
        tasks: dicts with `task`, `prompt`, `options` and `answer`, the index of the right option.
        max_new_tokens: must exceed the length of the longest option.
        batch_size: questions per batch.

    Returns:
        The accuracy with Wilson's 95 % interval, the same by task, and one bool per question.
    """
    prompts = [encode_text(item["prompt"], tokenizer) for item in tasks]
    completions = sample_completions(
        model, tokenizer, prompts, [tokenizer.eos_token_id], max_new_tokens, temperature=0.0, batch_size=batch_size
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip() for ids in completions]
    hits = [text == item["options"][item["answer"]].strip() for text, item in zip(texts, tasks, strict=True)]
    by_task: dict[str, list[bool]] = {}
    for item, hit in zip(tasks, hits, strict=True):
        by_task.setdefault(item["task"], []).append(hit)
    shares = {name: wilson(sum(own), len(own)) for name, own in sorted(by_task.items())}
    return wilson(sum(hits), len(hits)), shares, hits
