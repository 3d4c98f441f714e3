"""Checks of a ranking that a schema has read, and its conversion to the canonical form."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from instructgpt_hf.data.rankings.schemas import Schema, ranks_from_scores
from instructgpt_hf.data.rows import is_messages, is_text, short


def is_prompt(prompt: Any) -> bool:
    """Whether a prompt is non-empty text, or chat messages with text that is not empty in all of them."""
    if not is_messages(prompt):
        return is_text(prompt)
    texts = [turn["content"] for turn in prompt]
    return all(isinstance(text, str) for text in texts) and any(map(is_text, texts))


def _text(completion: Any) -> str:
    """The text of a completion given as text or as one assistant message; "" if it is neither or blank."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content") if completion[0].get("role") == "assistant" else None
    return completion if is_text(completion) else ""


def canonical(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert a row without a problem to the canonical form: see `data.rankings.rows.ranking_rows`."""
    values = raw["ranks"] if "ranks" in raw else raw["scores"]
    texts = map(_text, raw["completions"])
    ranked = [(text, value) for text, value in zip(texts, values, strict=True) if value is not None and text]
    numbers = [value for _, value in ranked]
    prompt = raw["prompt"]
    if isinstance(prompt, list):
        prompt = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    return {
        "prompt": prompt,
        "completions": [text for text, _ in ranked],
        "ranks": [int(number) for number in numbers] if "ranks" in raw else ranks_from_scores(numbers),
        "unranked": len(values) - len(ranked),
        **({"labeler": None if raw["labeler"] is None else str(raw["labeler"])} if "labeler" in raw else {}),
    }


def row_problem(raw: dict[str, Any], schema: Schema) -> str | None:
    """What is wrong with a row that `schema` has read, or None."""
    column = "ranks" if "ranks" in raw else "scores"
    prompt, completions, values = raw["prompt"], raw["completions"], raw[column]
    if schema.strict and not is_prompt(prompt):
        return f"prompt: found {short(prompt)}, expected non-empty text or chat messages"
    if not isinstance(completions, list):
        return f"completions: found {short(completions)}, expected a list"
    if len(completions) < 2 and schema.strict and schema.group is None:
        return f"completions: found {len(completions)}, a ranking needs at least 2"
    if not isinstance(values, list) or len(values) != len(completions):
        count = len(values) if isinstance(values, list) else 0
        return f"{column}: found {count} for {len(completions)} completions, expected as many"
    given = [value for value in values if value is not None]
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in given):
        return f"{column}: found {values}, expected numbers"
    if column == "ranks" and any(value < 1 or value != int(value) for value in given):
        return f"ranks: found {values}, expected whole numbers from 1 (the best)"
    if column == "ranks" and _skips(given):
        return f"ranks: found {values}, which skip a rank; ranks run 1, 2, 3, and with a tie 1, 1, 3 or 1, 1, 2"
    return _completion_problem(completions, values) if schema.strict else None


def _skips(ranks: list[int | float]) -> bool:
    """Whether ranks are neither competition ranks (1, 1, 3) nor dense ranks (1, 1, 2)."""
    counts = Counter(int(rank) for rank in ranks)
    levels = sorted(counts)
    places = [1 + sum(counts[better] for better in levels[:index]) for index in range(len(levels))]
    return levels not in (places, list(range(1, len(levels) + 1)))


def _completion_problem(completions: list[Any], values: list[Any]) -> str | None:
    """What is wrong with the ranked completions of a row that its author can correct, or None."""
    first: dict[str, tuple[int, Any]] = {}
    for number, (completion, value) in enumerate(zip(completions, values, strict=True)):
        if value is None:
            continue
        text = _text(completion).strip()
        if not text:
            shown = short(completion)
            return f"completions: number {number} is {shown}, expected non-empty text or one assistant message"
        before, other = first.setdefault(text, (number, value))
        if other != value:
            return f"completions: numbers {before} and {number} are the same text, ranked {other} and {value}"
    return None
