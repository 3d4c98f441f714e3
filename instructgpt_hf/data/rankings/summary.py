"""What the reward trainer will see of a dataset of rankings: counts, lengths and what the limits leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import numpy as np

from instructgpt_hf.data.rankings.rows import COMPLETION_COUNTS, COUNTS, dropped_prompt, limit_ranking

EXAMPLES = 2

Encode = Callable[[dict[str, Any]], dict[str, Any]]


def words_of(row: dict[str, Any]) -> dict[str, Any]:
    """Stand-in for `data.rankings.rows.encode_ranking` without a tokenizer: words in place of token ids."""
    prompt = row["prompt"] or ""
    text = prompt if isinstance(prompt, str) else " ".join(turn["content"] for turn in prompt)
    return {
        "prompt_ids": text.split(),
        "completion_ids": [completion.split() for completion in row["completions"]],
        "ranks": row["ranks"],
    }


def summarize_rankings(
    rows: Iterable[dict[str, Any]],
    encode: Encode,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> dict[str, Any]:
    """Describe a dataset of rankings as the reward trainer will see it.

    Args:
        rows: rankings in their one form (`data.rankings.rows.ranking_rows`).
        encode: turns a row into `prompt_ids`, `completion_ids` and `ranks`; lengths count its ids.
        max_length, max_prompt_length: limits as in `data.rankings.rows.tokenize_rankings`; None is no limit.

    Returns:
        Plain JSON. Of all rows read: `read` (numbers of `prompts` and `completions`), `lengths` (of `prompt`,
        `completion` and `together`: `median`, `p95`, `max`), `examples` (the first rows) and `labelers` (`count`,
        `rankings`: labeler -> rankings, `shared_prompts`: prompts ranked by several; None if the source names no
        labeler). `dropped`: the counts of `data.rankings.rows.tokenize_rankings`. Of the rows that are left:
        `prompts`, `completions`, `by_size` (number of completions -> prompts), `pairs` (strict), `tied_pairs` and
        `longer_is_better` (share of the strict pairs whose better completion is the longer one, equal lengths counting
        one half; None without pairs).
    """
    summary = _Summary()
    for row in rows:
        ranking = encode(row)
        summary.add(row, ranking, limit_ranking(ranking, max_length, max_prompt_length))
    return summary.as_json()


class _Summary:
    def __init__(self) -> None:
        self.rows = self.completions = 0
        self.examples: list[dict[str, Any]] = []
        self.lengths: dict[str, list[int]] = {"prompt": [], "completion": [], "together": []}
        self.labelers: Counter[str] = Counter()
        self.ranked_by: dict[str, set[str]] = {}
        self.dropped = dict.fromkeys(COUNTS, 0)
        self.sizes: Counter[int] = Counter()
        self.pairs, self.ties, self.longer = 0, 0, 0.0

    def add(self, row: dict[str, Any], ranking: dict[str, Any], left: dict[str, Any]) -> None:
        """Count a row, its encoding, and what the limits have left of that."""
        self.rows += 1
        self.completions += len(row["completions"]) + row["unranked"]
        if len(self.examples) < EXAMPLES:
            self.examples.append({name: row[name] for name in ("prompt", "completions", "ranks")})
        if row.get("labeler") is not None:
            self.labelers[row["labeler"]] += 1
            self.ranked_by.setdefault(repr(row["prompt"]), set()).add(row["labeler"])
        prompt, completions = len(ranking["prompt_ids"]), [len(ids) for ids in ranking["completion_ids"]]
        self.lengths["prompt"].append(prompt)
        self.lengths["completion"] += completions
        self.lengths["together"] += [prompt + length for length in completions]
        for name in COMPLETION_COUNTS:
            self.dropped[name] += row["unranked"] if name == "dropped_unranked" else left[name]
        if reason := dropped_prompt(left["ranks"]):
            self.dropped[reason] += 1
            return
        self.sizes[len(left["ranks"])] += 1
        strict, tied, longer = _pairs(left)
        self.pairs, self.ties, self.longer = self.pairs + strict, self.ties + tied, self.longer + longer

    def as_json(self) -> dict[str, Any]:
        shared = sum(len(labelers) > 1 for labelers in self.ranked_by.values())
        rankings = dict(self.labelers.most_common())
        return {
            "read": {"prompts": self.rows, "completions": self.completions},
            "lengths": {name: _spread(values) for name, values in self.lengths.items()},
            "dropped": self.dropped,
            "prompts": self.sizes.total(),
            "completions": sum(size * number for size, number in self.sizes.items()),
            "by_size": {str(size): self.sizes[size] for size in sorted(self.sizes)},
            "pairs": self.pairs,
            "tied_pairs": self.ties,
            "longer_is_better": self.longer / self.pairs if self.pairs else None,
            "labelers": {"count": len(rankings), "rankings": rankings, "shared_prompts": shared} if rankings else None,
            "examples": self.examples,
        }


def _pairs(ranking: dict[str, Any]) -> tuple[int, int, float]:
    """Numbers of strict pairs, of tied pairs, and of strict pairs whose better completion is the longer one."""
    items = [(rank, len(ids)) for rank, ids in zip(ranking["ranks"], ranking["completion_ids"], strict=True)]
    strict = [sorted(pair) for pair in combinations(items, 2) if pair[0][0] != pair[1][0]]
    longer = sum(1.0 if better[1] > worse[1] else 0.5 * (better[1] == worse[1]) for better, worse in strict)
    return len(strict), len(items) * (len(items) - 1) // 2 - len(strict), longer


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {"median": 0.0, "p95": 0.0, "max": 0}
    median, high = np.percentile(values, [50, 95])
    return {"median": float(median), "p95": float(high), "max": max(values)}
