"""Prompts of the PPO stage and of the evaluation, with the other columns that reward functions read."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.files import Row, Rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rows import (
    first_columns,
    missing_columns,
    prompt_feature,
    raise_unrendered,
    read_rows,
    rendering,
    uniform_prompts,
)
from instructgpt_hf.data.schemas import PROMPTS, has_prompt, read_prompt
from instructgpt_hf.errors import InstructGPTError


def prompt_rows(
    rows: Rows,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    where: str,
    with_columns: bool = True,
) -> tuple[Dataset, dict[str, int]]:
    """Read prompts and drop those over the limit (InstructGPT appendix C: prompts of more than 1k tokens).

    Args:
        with_columns: keep the source's other columns, for reward functions.

    Returns:
        The column `prompt` (text or messages), the other columns if they are kept, and the counts
        `dropped_empty` (rows without a prompt), `dropped_too_long` and `longest_tokens` (tokens of the longest prompt
        kept).

    Raises:
        InstructGPTError: naming the missing column, every wrong row, or the limit if all prompts are longer.
    """
    read, empty = read_prompts(rows, where)
    lengths = _lengths(read, prompt_format, tokenizer, where)
    limit = max(lengths) if max_prompt_length is None else max_prompt_length
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise InstructGPTError(
            f"{where}: every prompt is longer than max_prompt_length={max_prompt_length} tokens once rendered "
            f"(the shortest has {min(lengths)})."
        )
    counts = {
        "dropped_empty": empty,
        "dropped_too_long": len(lengths) - len(kept),
        "longest_tokens": max(lengths[index] for index in kept),
    }
    return to_dataset([read[index] for index in kept], with_columns), counts


def read_prompts(rows: Rows, where: str) -> tuple[list[Row], int]:
    """Every row as `prompt`, `source` (the row itself) and `row` (its place); and the number of rows left out.

    Raises:
        InstructGPTError: naming the missing column, or every wrong row.
    """
    columns = first_columns(rows, where)
    if not has_prompt(columns):
        raise InstructGPTError(
            f"{missing_columns(columns, ['prompt'], where)} A prompt is read from {', '.join(PROMPTS)}."
        )
    read, empty = read_rows(rows, where, lambda row: [{"prompt": read_prompt(row), "source": row}])
    if not read:
        raise InstructGPTError(f"{where}: has no rows.")
    return uniform_prompts(read), empty


def _lengths(
    read: list[Row], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    """Tokens of every rendered prompt."""
    render = rendering(lambda row: {"length": len(prompt_format.prompt_ids(row["prompt"], tokenizer))}, {"length": 0})
    rendered = [render(row, index) for index, row in enumerate(read)]
    raise_unrendered((row["problem"] for row in rendered), where)
    return [row["length"] for row in rendered]


def to_dataset(read: list[Row], with_columns: bool) -> Dataset:
    """Prompts, and the other columns of their rows if wanted."""
    prompts = Dataset.from_dict(
        {"prompt": [row["prompt"] for row in read]}, features=Features({"prompt": prompt_feature(read)})
    )
    if not with_columns:
        return prompts
    names = dict.fromkeys(name for row in read for name in row["source"] if name != "prompt")
    columns = [_column(name, [row["source"].get(name) for row in read]) for name in names]
    return concatenate_datasets([prompts, *columns], axis=1)


def _column(name: str, values: list[Any]) -> Dataset:
    """A column; one whose values are of several types is kept as JSON."""
    try:
        return Dataset.from_dict({name: values})
    except (pa.ArrowException, TypeError, ValueError, ArithmeticError):
        return Dataset.from_dict({name: values}, features=Features({name: Json()}))
