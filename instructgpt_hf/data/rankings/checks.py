"""Checks of a ranking that a schema has read, and its conversion to the canonical form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from instructgpt_hf.data.messages import Prompt, as_completion, as_prompt
from instructgpt_hf.data.rankings.schemas import Schema, ranks_from_scores
from instructgpt_hf.data.values import WrongRow, short


def _text(completion: Any) -> str:
    """The text of a completion given as text or as one assistant message; "" if it is neither or blank."""
    try:
        return as_completion(completion, "completions")
    except WrongRow:
        return ""


def usable_prompt(raw: dict[str, Any]) -> Prompt | None:
    """The prompt of a row that a schema has read, or None if it cannot be used."""
    try:
        return as_prompt(raw["prompt"])
    except WrongRow:
        return None


def canonical(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert a row without a problem to the canonical form: see `data.rankings.rows.ranking_rows`."""
    values = raw["ranks"] if "ranks" in raw else raw["scores"]
    texts = map(_text, raw["completions"])
    ranked = [(text, value) for text, value in zip(texts, values, strict=True) if value is not None and text]
    prompt = usable_prompt(raw)
    if prompt is None:
        ranked = []
    numbers = [value for _, value in ranked]
    return {
        "prompt": prompt,
        "completions": [text for text, _ in ranked],
        "ranks": [int(number) for number in numbers] if "ranks" in raw else ranks_from_scores(numbers),
        "unranked": len(values) - len(ranked),
        **({"labeler": None if raw["labeler"] is None else str(raw["labeler"])} if "labeler" in raw else {}),
    }


def check_ranking(raw: dict[str, Any], schema: Schema) -> None:
    """Raise `WrongRow` if a row that `schema` has read cannot be used, or not in full where the schema is strict."""
    column = "ranks" if "ranks" in raw else "scores"
    completions, values = raw["completions"], raw[column]
    if not isinstance(completions, list):
        raise WrongRow(f"completions: found {short(completions)}, expected a list")
    if len(completions) < 2 and schema.strict and schema.group is None:
        raise WrongRow(f"completions: found {len(completions)}, a ranking needs at least 2")
    if not isinstance(values, list) or len(values) != len(completions):
        count = len(values) if isinstance(values, list) else short(values)
        raise WrongRow(f"{column}: found {count} for {len(completions)} completions, expected as many")
    given = [value for value in values if value is not None]
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in given):
        raise WrongRow(f"{column}: found {values}, expected numbers")
    if column == "ranks" and any(value < 1 or value != int(value) for value in given):
        raise WrongRow(f"ranks: found {values}, expected whole numbers from 1 (the best)")
    if column == "ranks" and _skips(given):
        raise WrongRow(
            f"ranks: found {values}, which skip a rank; ranks run 1, 2, 3, and with a tie 1, 1, 3 or 1, 1, 2"
        )
    if schema.strict:
        as_prompt(raw["prompt"])
        pair = schema.columns == ("chosen", "rejected")
        names = schema.columns if pair else [f"completions: number {number}" for number in range(len(completions))]
        _check_completions(completions, values, names)


def _skips(ranks: list[int | float]) -> bool:
    """Whether ranks are neither competition ranks (1, 1, 3) nor dense ranks (1, 1, 2)."""
    counts = Counter(int(rank) for rank in ranks)
    levels = sorted(counts)
    places = [1 + sum(counts[better] for better in levels[:index]) for index in range(len(levels))]
    return levels not in (places, list(range(1, len(levels) + 1)))


def _check_completions(completions: list[Any], values: list[Any], names: Sequence[str]) -> None:
    """Raise `WrongRow`, with the completion's name, for a ranked completion that is none, or that has two ranks."""
    first: dict[str, tuple[str, Any]] = {}
    for name, completion, value in zip(names, completions, values, strict=True):
        if value is None:
            continue
        text = as_completion(completion, name).strip()
        before, other = first.setdefault(text, (name, value))
        if other != value:
            both = f"{before} and {name}".replace("number", "numbers", 1).replace("and completions: number", "and")
            raise WrongRow(f"{both} are the same text, ranked {other} and {value}", tolerable=True)
