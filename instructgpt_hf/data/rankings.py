"""Stage 2 data: K completions of a prompt with their ranks, 1 = best, equal = tied."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset
from trl import extract_prompt

from instructgpt_hf.data.loading import check_rows, is_text, require_columns
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError

COLUMNS = ["prompt", "completions", "ranks"]


def ranking_rows(dataset: Dataset, where: str) -> Dataset:
    """A rankings dataset in its one form: columns `prompt`, `completions`, `ranks`.

    Accepts `ranks` (1 = best), `scores` instead of ranks (higher = better), and TRL's preference pairs
    (`chosen`/`rejected`, with or without an explicit `prompt`) as K = 2.

    Raises:
        InstructGPTError: naming missing columns, or every wrong row.
    """
    columns = dataset.column_names
    if "completions" not in columns and {"chosen", "rejected"} <= set(columns):
        if "prompt" not in columns:
            dataset = dataset.map(extract_prompt, desc="Extracting prompts")
        dataset = dataset.map(
            lambda row: {"completions": [_text(row["chosen"]), _text(row["rejected"])], "ranks": [1, 2]},
            remove_columns=[name for name in dataset.column_names if name != "prompt"],
        )
    elif "ranks" not in columns and "scores" in columns:
        require_columns(dataset, ["prompt", "completions"], where)
        check_rows(dataset, where, lambda row: _row_problem(row, "scores"))
        dataset = dataset.map(lambda row: {"ranks": ranks_from_scores(row["scores"])})
    require_columns(dataset, COLUMNS, where)
    dataset = dataset.select_columns(COLUMNS)
    check_rows(dataset, where, lambda row: _row_problem(row, "ranks"))
    return dataset


def ranks_from_scores(scores: list[float]) -> list[int]:
    """Competition ranks of scores where higher is better: [2.0, 5.0, 2.0] -> [2, 1, 2]."""
    return [1 + sum(other > score for other in scores) for score in scores]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _row_problem(row: dict[str, Any], column: str) -> str | None:
    completions, values = row["completions"], row[column]
    if not is_text(row["prompt"]):
        return f"prompt: found {row['prompt']!r}, expected non-empty text or chat messages"
    if not isinstance(completions, list) or len(completions) < 2:
        found = len(completions) if isinstance(completions, list) else 0
        return f"completions: found {found}, a ranking needs at least 2"
    if not all(isinstance(item, str) and item.strip() for item in completions):
        return "completions: every completion must be non-empty text"
    if not isinstance(values, list) or len(values) != len(completions):
        found = len(values) if isinstance(values, list) else 0
        return f"{column}: found {found} for {len(completions)} completions, expected as many"
    if any(value is None or not math.isfinite(value) for value in values):
        return f"{column}: found {values}, expected numbers"
    if column == "ranks" and any(value < 1 or value != int(value) for value in values):
        return f"ranks: found {values}, expected whole numbers from 1 (the best)"
    return None


def tokenize_rankings(
    dataset: Dataset,
    prompt_format: PromptFormat,
    tokenizer: Any,
    max_length: int,
    where: str,
    max_prompt_length: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Token ids of every prompt + completion.

    Args:
        dataset: columns `prompt`, `completions`, `ranks`.
        max_length: longest prompt + completion, in tokens. A longer completion leaves its ranking; a truncated one
            would be scored without its EOS.
        max_prompt_length: longest prompt, in tokens; the ranking of a longer one is left out.

    Returns:
        Dataset with `prompt_ids` [P], `completion_ids` [K][c_k], each with its EOS, and `ranks` [K]; and the counts
        `dropped_duplicates` (completions listed twice with the same rank), `dropped_completions` (over a limit),
        `dropped_too_few` (prompts left with fewer than two completions) and `dropped_ties` (prompts whose completions
        are all tied, which have no pair to learn from).

    Raises:
        InstructGPTError: if no ranking is left.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_format.prompt_ids(row["prompt"], tokenizer)
        found: dict[tuple[int, ...], int] = {}
        for text, rank in zip(row["completions"], row["ranks"], strict=True):
            found.setdefault(tuple(prompt_format.completion_ids(row["prompt"], text, tokenizer)), int(rank))
        room = max_length - len(prompt) if max_prompt_length is None or len(prompt) <= max_prompt_length else 0
        kept = [(list(ids), rank) for ids, rank in found.items() if len(ids) <= room]
        return {
            "prompt_ids": prompt,
            "completion_ids": [ids for ids, _ in kept],
            "ranks": [rank for _, rank in kept],
            "duplicates": len(row["ranks"]) - len(found),
            "dropped": len(found) - len(kept),
        }

    encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="Tokenizing rankings")
    enough = encoded.filter(lambda row: len(row["ranks"]) >= 2)
    strict = enough.filter(lambda row: len(set(row["ranks"])) > 1)
    counts = {
        "dropped_duplicates": sum(encoded["duplicates"]),
        "dropped_completions": sum(encoded["dropped"]),
        "dropped_too_few": len(encoded) - len(enough),
        "dropped_ties": len(enough) - len(strict),
    }
    if len(strict) == 0:
        raise InstructGPTError(
            f"{where}: no ranking is left to learn from: of {len(encoded)} prompts, {counts['dropped_too_few']} keep "
            f"fewer than two completions within max_length={max_length} tokens and {counts['dropped_ties']} have only "
            "ties."
        )
    return strict.remove_columns(["duplicates", "dropped"]), counts
