"""Stage 1 data: demonstrations, and the pretraining text mixed into them for the RL initialisation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.files import Rows
from instructgpt_hf.data.pretraining import document_ids, leading_ids
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rows import (
    Tokenized,
    first_columns,
    missing_columns,
    raise_unrendered,
    read_rows,
    rendering,
    text_rows,
    uniform_prompts,
)
from instructgpt_hf.data.schemas import (
    ANSWERS,
    INPUTS,
    PROMPTS,
    SYSTEMS,
    TEXT,
    first_of,
    has_prompt,
    read_demonstration,
)
from instructgpt_hf.errors import InstructGPTError

IGNORED = -100  # the label that PyTorch's cross entropy skips
COLUMNS = (
    f"Demonstrations have a prompt ({', '.join(PROMPTS)}; with it {', '.join((*INPUTS, *SYSTEMS))}) and an answer "
    f"({', '.join(dict.fromkeys(ANSWERS))}), or {TEXT} alone."
)


def demonstration_rows(rows: Rows, where: str) -> Dataset:
    """Demonstrations in canonical form, from any of the columns that `data.schemas` knows.

    Returns:
        Columns `prompt` (text or messages; None where the row is `text` without a prompt), `completion` (text) and
        `row` (its place in the source).

    Raises:
        InstructGPTError: naming missing columns, or every wrong row.
    """
    return read_demonstrations(rows, where)[0]


def read_demonstrations(rows: Rows, where: str) -> tuple[Dataset, int]:
    """`demonstration_rows`, and the number of rows left out because they lack a prompt or an answer."""
    columns = first_columns(rows, where)
    answer = first_of(ANSWERS, columns)
    prompted = has_prompt(columns) if answer is not None else TEXT in columns
    if not prompted:
        expected = ("completion",) if has_prompt(columns) else ("prompt", answer or "completion")
        raise InstructGPTError(f"{missing_columns(columns, expected, where)} {COLUMNS}")
    if answer is None and "role" in columns:
        raise InstructGPTError(
            f"{where}: one message per row (it has {', '.join(map(repr, columns))}), of which {TEXT} alone would be "
            f"learned without its conversation. Join the messages of each conversation to one row with messages."
        )
    demonstrations, left_out = read_rows(rows, where, functools.partial(read_demonstration, columns=columns))
    if not demonstrations:
        raise InstructGPTError(f"{where}: has no rows.")
    return text_rows(uniform_prompts(demonstrations)), left_out


def tokenize_demonstrations(
    dataset: Dataset,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
    max_prompt_length: int | None = None,
) -> Tokenized:
    """Tokenize demonstrations; labels ignore the prompt and include the completion's EOS.

    Args:
        dataset: demonstrations in canonical form (`demonstration_rows`).
        max_length: longest prompt + completion, in tokens. Longer demonstrations are dropped, not truncated: a
            truncated one would teach the model not to stop.
        max_prompt_length: longest prompt, in tokens; demonstrations with longer prompts are dropped.

    Returns:
        Rows with `input_ids` and `labels`, and `dropped_too_long`, the number of demonstrations left out for length.

    Raises:
        InstructGPTError: naming every row that the prompt format cannot render; or if none is short enough.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = demonstration_ids(row, prompt_format, tokenizer)
        labels = [IGNORED] * len(prompt) + completion
        return {"input_ids": prompt + completion, "labels": labels, "prompt_length": len(prompt)}

    encoded = dataset.map(
        rendering(encode, {"input_ids": [], "labels": [], "prompt_length": 0}),
        with_indices=True,
        remove_columns=dataset.column_names,
        desc="Tokenizing demonstrations",
    )
    raise_unrendered(encoded["problem"], where)
    prompt_limit = max_prompt_length or max_length
    lengths = [(len(row["input_ids"]), row["prompt_length"]) for row in encoded]
    kept = [index for index, (all_, prompt) in enumerate(lengths) if all_ <= max_length and prompt <= prompt_limit]
    if not kept:
        raise InstructGPTError(
            f"{where}: every demonstration is longer than max_length={max_length} tokens or its prompt than "
            f"max_prompt_length={prompt_limit} (the shortest has {min(lengths)[0]} tokens, its "
            f"shortest prompt {min(prompt for _, prompt in lengths)})."
        )
    rows = encoded.select(kept).remove_columns(["prompt_length", "problem"])
    return Tokenized(rows, {"dropped_too_long": len(encoded) - len(kept)}, kept)


def demonstration_ids(
    row: dict[str, Any], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a demonstration's prompt and of its completion; text without a prompt is read as a document."""
    if row["prompt"] is None:
        return [], document_ids(row["completion"], tokenizer, leading_ids(tokenizer))
    prompt = prompt_format.prompt_ids(row["prompt"], tokenizer)
    return prompt, prompt_format.completion_ids(row["prompt"], row["completion"], tokenizer)


def mix_pretraining(demonstrations: Dataset, blocks: Iterator[list[int]], fraction: float, seed: int) -> Dataset:
    """Mix pretraining examples into the demonstrations (InstructGPT appendix C.3).

    The paper does not state whether its 10 % counts tokens or examples; here it counts examples.

    Args:
        demonstrations: columns `input_ids`, `labels`.
        blocks: endless packed token blocks; every token of a block is trained on.
        fraction: share of the mixed examples that is pretraining text, in [0, 1).
        seed: seed of the order of the mixture.
    """
    count = round(len(demonstrations) * fraction / (1.0 - fraction))
    rows = [next(blocks) for _ in range(count)]
    ids = [*demonstrations["input_ids"], *rows]
    labels = [*demonstrations["labels"], *rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels}).shuffle(seed=seed)
