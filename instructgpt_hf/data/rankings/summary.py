"""Summary of a dataset of rankings as the reward trainer will see it: counts, lengths, rows left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import numpy as np

from instructgpt_hf.data.rankings.rows import DROPPED, count_dropped, limit_ranking

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
        rows: rankings in their canonical form (`data.rankings.rows.ranking_rows`).
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
    read, examples, dropped = 0, list[dict[str, Any]](), dict.fromkeys(DROPPED, 0)
    prompts, completions, together = list[int](), list[int](), list[int]()  # lengths
    labelers, sizes, ranked_by = Counter[str](), Counter[int](), defaultdict[str, set[str]](set)
    pairs, ties, longer = 0, 0, 0.0
    for row in rows:
        read += len(row["completions"]) + row["unranked"]
        if len(examples) < EXAMPLES:
            examples.append({name: row[name] for name in ("prompt", "completions", "ranks")})
        if (labeler := row.get("labeler")) is not None:
            labelers[labeler] += 1
            ranked_by[repr(row["prompt"])].add(labeler)
        ranking = encode(row)
        lengths = [len(ids) for ids in ranking["completion_ids"]]
        prompts.append(len(ranking["prompt_ids"]))
        completions += lengths
        together += [prompts[-1] + length for length in lengths]
        left = limit_ranking(ranking, max_length, max_prompt_length)
        if count_dropped(dropped, row["unranked"], left):
            sizes[len(left["ranks"])] += 1
            strict, tied, better = _pairs(left)
            pairs, ties, longer = pairs + strict, ties + tied, longer + better
    shared = sum(len(names) > 1 for names in ranked_by.values())
    rankings = dict(labelers.most_common())
    return {
        "read": {"prompts": len(prompts), "completions": read},
        "lengths": {"prompt": _spread(prompts), "completion": _spread(completions), "together": _spread(together)},
        "dropped": dropped,
        "prompts": sizes.total(),
        "completions": sum(size * number for size, number in sizes.items()),
        "by_size": {str(size): sizes[size] for size in sorted(sizes)},
        "pairs": pairs,
        "tied_pairs": ties,
        "longer_is_better": longer / pairs if pairs else None,
        "labelers": {"count": len(rankings), "rankings": rankings, "shared_prompts": shared} if rankings else None,
        "examples": examples,
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
