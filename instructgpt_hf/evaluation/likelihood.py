"""Multiple choice by likelihood and loss on text: what the alignment tax is measured with (InstructGPT App. D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from instructgpt_hf.data.pretraining import leading_ids
from instructgpt_hf.errors import InstructGPTError, Problems
from instructgpt_hf.evaluation.intervals import wilson
from instructgpt_hf.evaluation.scoring import continuation_log_probs

_KEYS = ("task", "prompt", "options", "answer")


def option_accuracy(
    model: Any, tokenizer: Any, tasks: Sequence[Mapping[str, Any]], batch_size: int = 16
) -> dict[str, Any]:
    """Share of questions whose right option has the highest mean log-probability per token.

    Appendix D prints "lowest average per-token log-probability", which must mean the lowest loss. Text is scored as it
    stands: no chat template, and a beginning-of-text token only where the tokenizer puts one by itself.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: dicts with `task` (a name), `prompt`, `options` (at least two different texts, each with the space that
            separates it from the prompt) and `answer`, the index of the right one.
        batch_size: sequences per forward pass; every option is one.

    Returns:
        `accuracy` with Wilson's 95 % interval in `accuracy_low` and `accuracy_high`, `correct`, `count`, `chance` (the
        mean of one over the number of options), `by_task` (the same numbers for each task, by name) and `hits`, one
        bool per question in the order given, for `paired_difference`.

    Raises:
        InstructGPTError: if there are no tasks or some are malformed, all of them named.
    """
    _check_tasks(tasks)
    prompts, options, owners = [], [], []
    for number, item in enumerate(tasks):
        for option in item["options"]:
            prompt_ids, option_ids = _split(tokenizer, item["prompt"], option)
            prompts.append(prompt_ids)
            options.append(option_ids)
            owners.append(number)
    means = [logps.mean().item() for logps in continuation_log_probs(model, prompts, options, batch_size)]
    scores: list[list[float]] = [[] for _ in tasks]
    for number, mean in zip(owners, means, strict=True):
        scores[number].append(mean)
    hits = [row.index(max(row)) == item["answer"] for row, item in zip(scores, tasks, strict=True)]
    by_task: dict[str, list[int]] = {}
    for number, item in enumerate(tasks):
        by_task.setdefault(item["task"], []).append(number)
    return {
        **_summary(tasks, hits, range(len(tasks))),
        "by_task": {name: _summary(tasks, hits, numbers) for name, numbers in sorted(by_task.items())},
        "hits": hits,
    }


def text_loss(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 8) -> float:
    """Mean next-token loss on held-out pretraining text, in nats per token, every token weighing the same.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: documents; each is cut to `max_length` tokens.
        max_length: tokens per document that are scored or conditioned on.
        batch_size: documents per forward pass.

    Raises:
        InstructGPTError: if no text has two tokens.
    """
    rows = [(leading_ids(tokenizer) + _encode(tokenizer, text))[:max_length] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InstructGPTError(f"pretraining loss: none of {len(texts)} texts has two tokens to predict one from.")
    logps = continuation_log_probs(model, [row[:1] for row in rows], [row[1:] for row in rows], batch_size)
    return -torch.cat(logps).double().mean().item()


def _summary(tasks: Sequence[Mapping[str, Any]], hits: Sequence[bool], numbers: Sequence[int]) -> dict[str, Any]:
    correct = sum(hits[number] for number in numbers)
    share, low, high = wilson(correct, len(numbers))
    chance = sum(1 / len(tasks[number]["options"]) for number in numbers) / len(numbers)
    return {
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
        "correct": correct,
        "count": len(numbers),
        "chance": chance,
    }


def _split(tokenizer: Any, prompt: str, option: str) -> tuple[list[int], list[int]]:
    """Ids of both parts of `prompt + option` as it is tokenized; a token across the border belongs to the option."""
    prompt_ids, whole = _encode(tokenizer, prompt), _encode(tokenizer, prompt + option)
    shared = 0
    while shared < min(len(prompt_ids), len(whole) - 1) and prompt_ids[shared] == whole[shared]:
        shared += 1
    lead = leading_ids(tokenizer)
    if not shared and not lead:
        # Nothing comes before the first token: it cannot be scored, and is the same for every option or almost so.
        shared = 1
    return lead + whole[:shared], whole[shared:]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _check_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    if not tasks:
        raise InstructGPTError("task accuracy: there are no questions.")
    problems = Problems("task accuracy: malformed questions")
    for number, item in enumerate(tasks):
        missing = [key for key in _KEYS if key not in item]
        if missing:
            problems.add(f"question {number}: missing {', '.join(missing)}; expected {', '.join(_KEYS)}")
            continue
        options, answer = item["options"], item["answer"]
        if len(options) < 2 or len(set(options)) < len(options) or not all(options):
            problems.add(f"question {number}: options must be at least two different texts, got {options!r}")
        elif isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
            problems.add(f"question {number}: answer must be an index below {len(options)}, got {answer!r}")
        elif not item["prompt"]:
            problems.add(f"question {number}: the prompt is empty")
    problems.raise_if_any()
