"""What the reward trainer will see of a dataset of rankings: counts, lengths, what the limits leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import numpy as np

from instructgpt_hf.data.rankings.rows import COUNTS, dropped_prompt, limit_ranking

EXAMPLES = 2


def words_of(row: dict[str, Any]) -> dict[str, Any]:
    """A ranking with words in place of tokens, for when there is no tokenizer; see `data.rankings.encode_ranking`."""
    prompt = row["prompt"] or ""
    text = prompt if isinstance(prompt, str) else " ".join(turn["content"] for turn in prompt)
    return {
        "prompt_ids": text.split(),
        "completion_ids": [completion.split() for completion in row["completions"]],
        "ranks": row["ranks"],
    }


def summarize_rankings(
    rows: Iterable[dict[str, Any]],
    encode: Callable[[dict[str, Any]], dict[str, Any]],
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> dict[str, Any]:
    """Describe a dataset of rankings as the trainer will see it.

    Args:
        rows: rankings in their one form (`data.rankings.ranking_rows`).
        encode: turns a row into `prompt_ids`, `completion_ids` and `ranks`; its ids are what lengths count.
        max_length, max_prompt_length: limits of the trainer (`data.rankings.tokenize_rankings`); None is no limit.

    Returns:
        Plain JSON: `read` (`prompts` and `completions` of the dataset), `lengths` (of `prompt`, `completion` and
        `together`: `median`, `p95`, `max`) of all that was read; `dropped` (the counts of
        `data.rankings.tokenize_rankings`); and of what is left `prompts`, `completions`, `by_size` (number of
        completions -> prompts), `pairs` (strict), `tied_pairs`, `longer_is_better` (share of the strict pairs whose
        better completion is the longer one, equal lengths counting one half; None without pairs); `labelers`
        (`count`, `rankings`: labeler -> rankings, `shared_prompts`: prompts ranked by several; None if the source
        names none) and `examples` (the first rows).
    """
    lengths: dict[str, list[int]] = {"prompt": [], "completion": [], "together": []}
    dropped = dict.fromkeys(COUNTS, 0)
    sizes: Counter[int] = Counter()
    pairs, ties, longer = 0, 0, 0.0
    labelers: Counter[str] = Counter()
    ranked_by: dict[str, set[str]] = {}
    examples: list[dict[str, Any]] = []
    count = completions = 0
    for row in rows:
        count += 1
        completions += len(row["completions"]) + row["unranked"]
        if len(examples) < EXAMPLES:
            examples.append({name: row[name] for name in ("prompt", "completions", "ranks")})
        if row.get("labeler") is not None:
            labelers[row["labeler"]] += 1
            ranked_by.setdefault(repr(row["prompt"]), set()).add(row["labeler"])
        ranking = encode(row)
        prompt, sizes_of = len(ranking["prompt_ids"]), [len(ids) for ids in ranking["completion_ids"]]
        lengths["prompt"].append(prompt)
        lengths["completion"] += sizes_of
        lengths["together"] += [prompt + size for size in sizes_of]
        left = limit_ranking(ranking, max_length, max_prompt_length)
        dropped["dropped_unranked"] += row["unranked"]
        for name in COUNTS[1:4]:
            dropped[name] += left[name]
        if reason := dropped_prompt(left["ranks"]):
            dropped[reason] += 1
            continue
        sizes[len(left["ranks"])] += 1
        found = _pairs(left)
        pairs, ties, longer = pairs + found[0], ties + found[1], longer + found[2]
    return {
        "read": {"prompts": count, "completions": completions},
        "lengths": {name: _spread(values) for name, values in lengths.items()},
        "dropped": dropped,
        "prompts": sum(sizes.values()),
        "completions": sum(size * number for size, number in sizes.items()),
        "by_size": {str(size): sizes[size] for size in sorted(sizes)},
        "pairs": pairs,
        "tied_pairs": ties,
        "longer_is_better": longer / pairs if pairs else None,
        "labelers": _labelers(labelers, ranked_by),
        "examples": examples,
    }


def _pairs(ranking: dict[str, Any]) -> tuple[int, int, float]:
    """Strict pairs, tied pairs, and the strict ones whose better completion is the longer one."""
    items = [(rank, len(ids)) for rank, ids in zip(ranking["ranks"], ranking["completion_ids"], strict=True)]
    strict = [sorted(pair) for pair in combinations(items, 2) if pair[0][0] != pair[1][0]]
    longer = sum(1.0 if better[1] > worse[1] else 0.5 * (better[1] == worse[1]) for better, worse in strict)
    return len(strict), len(items) * (len(items) - 1) // 2 - len(strict), longer


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {"median": 0.0, "p95": 0.0, "max": 0}
    median, high = np.percentile(values, [50, 95])
    return {"median": float(median), "p95": float(high), "max": max(values)}


def _labelers(rankings: Counter[str], ranked_by: dict[str, set[str]]) -> dict[str, Any] | None:
    if not rankings:
        return None
    shared = sum(len(labelers) > 1 for labelers in ranked_by.values())
    return {"count": len(rankings), "rankings": dict(rankings.most_common()), "shared_prompts": shared}
