"""Stage 2 data: K completions of a prompt with their ranks, 1 = best, equal = tied."""

from __future__ import annotations

import math
from typing import Any

import torch
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
        Dataset with `completions_ids` [K][tokens], `ranks` [K] and `prompt_length`; and the counts
        `dropped_completions`, `dropped_too_few` (prompts left with fewer than two completions) and `dropped_ties`
        (prompts whose completions are all tied, which have no pair to learn from).

    Raises:
        InstructGPTError: if no ranking is left.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_format.prompt_ids(row["prompt"], tokenizer)
        ids = [prompt + prompt_format.completion_ids(row["prompt"], text, tokenizer) for text in row["completions"]]
        fits = max_prompt_length is None or len(prompt) <= max_prompt_length
        kept = [index for index, item in enumerate(ids) if fits and len(item) <= max_length]
        return {
            "completions_ids": [ids[index] for index in kept],
            "ranks": [int(row["ranks"][index]) for index in kept],
            "prompt_length": len(prompt),
            "dropped": len(ids) - len(kept),
        }

    encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="Tokenizing rankings")
    enough = encoded.filter(lambda row: len(row["ranks"]) >= 2)
    strict = enough.filter(lambda row: len(set(row["ranks"])) > 1)
    counts = {
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
    return strict.remove_columns("dropped"), counts


class RankingCollator:
    """Batches prompts, each with all its completions, as one flat padded batch.

    Args:
        pad_token_id: padding id; the reward model reads the score at the last token that is not padding.
        padding_side: `"right"` or `"left"`; the loss does not depend on it.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right") -> None:
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """G prompts with M completions in all, the longest of L tokens.

        Returns:
            `input_ids` [M, L], `attention_mask` [M, L], `ranks` [M], `groups` [M] (index of the prompt) and `labels`
            [G]: one zero for each prompt, which is how the Trainer counts the prompts of an optimizer step.
        """
        sequences = [torch.tensor(ids) for row in rows for ids in row["completions_ids"]]
        width = max(len(ids) for ids in sequences)
        input_ids = torch.full((len(sequences), width), self.pad_token_id)
        attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for index, ids in enumerate(sequences):
            real = slice(0, len(ids)) if self.padding_side == "right" else slice(width - len(ids), width)
            input_ids[index, real] = ids
            attention_mask[index, real] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "groups": torch.tensor([group for group, row in enumerate(rows) for _ in row["ranks"]]),
            "labels": torch.zeros(len(rows), dtype=torch.long),
        }
