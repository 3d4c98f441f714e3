"""Stage 3 data: the prompts that rollouts answer."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from instructgpt_hf.data.loading import check_rows, is_text, require_columns
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError


def prompt_rows(
    dataset: Dataset, prompt_format: PromptFormat, tokenizer: Any, max_prompt_length: int | None, where: str
) -> tuple[Dataset, dict[str, int]]:
    """Prompts no longer than the limit (InstructGPT appendix C drops prompts of more than 1k tokens).

    Returns:
        The dataset, other columns kept for reward functions; the count of prompts dropped for their length, and the
        tokens of the longest one kept.

    Raises:
        InstructGPTError: naming the missing column, every wrong row, or the limit if all prompts are longer.
    """
    require_columns(dataset, ["prompt"], where)
    check_rows(
        dataset,
        where,
        lambda row: (
            None
            if is_text(row["prompt"])
            else f"prompt: found {row['prompt']!r}, expected non-empty text or chat messages"
        ),
    )
    lengths = [len(prompt_format.prompt_ids(prompt, tokenizer)) for prompt in dataset["prompt"]]
    limit = max(lengths) if max_prompt_length is None else max_prompt_length
    kept = dataset.select([index for index, length in enumerate(lengths) if length <= limit])
    if len(kept) == 0:
        raise InstructGPTError(
            f"{where}: every prompt is longer than max_prompt_length={max_prompt_length} tokens once rendered "
            f"(the shortest has {min(lengths)})."
        )
    longest = max(length for length in lengths if length <= limit)
    return kept, {"dropped_too_long": len(dataset) - len(kept), "longest_tokens": longest}
