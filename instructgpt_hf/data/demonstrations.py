"""Stage 1 data: demonstrations, and the pretraining text mixed into them for the RL initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rows import check_rows, check_texts, is_messages
from instructgpt_hf.errors import InstructGPTError

IGNORED = -100  # the label that PyTorch's cross entropy skips


def _messages(dataset: Dataset, where: str) -> Dataset:
    """TRL's language-modelling conversations, whose last turn is the completion."""
    check_rows(dataset, where, _messages_problem)
    return dataset.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1]["content"]},
        remove_columns=[name for name in dataset.column_names if name != "prompt"],
    )


# Column -> reader of the schema with this column, which returns the columns `prompt` and `completion`. Of several in a
# dataset, the first decides.
SCHEMAS: dict[str, Callable[[Dataset, str], Dataset]] = {
    "completion": lambda dataset, where: dataset,
    "response": lambda dataset, where: dataset.rename_column("response", "completion"),
    "messages": _messages,
}


def demonstration_rows(dataset: Dataset, where: str) -> Dataset:
    """Convert demonstrations from any known schema (`SCHEMAS`) to the columns `prompt` and `completion`.

    Raises:
        InstructGPTError: naming missing columns, or every wrong row.
    """
    column = next((column for column in SCHEMAS if column in dataset.column_names), "completion")
    dataset = SCHEMAS[column](dataset, where)
    check_texts(dataset, ["prompt", "completion"], where)
    return dataset.select_columns(["prompt", "completion"])


def _messages_problem(row: dict[str, Any]) -> str | None:
    turns = row["messages"]
    if not is_messages(turns):
        return "messages: expected a non-empty list of {'role', 'content'}"
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        return "messages: the last of at least two turns must be the assistant's"
    return None


def tokenize_demonstrations(
    dataset: Dataset,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
    max_prompt_length: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Tokenize demonstrations; labels ignore the prompt and include the completion's EOS.

    Args:
        dataset: columns `prompt`, `completion`.
        max_length: longest prompt + completion, in tokens. Longer demonstrations are dropped, not truncated: a
            truncated one would teach the model not to stop.
        max_prompt_length: longest prompt, in tokens; demonstrations with longer prompts are dropped.

    Returns:
        Dataset with `input_ids` and `labels`, and the count of demonstrations dropped for their length.

    Raises:
        InstructGPTError: if none is short enough.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_format.prompt_ids(row["prompt"], tokenizer)
        completion = prompt_format.completion_ids(row["prompt"], row["completion"], tokenizer)
        labels = [IGNORED] * len(prompt) + completion
        return {"input_ids": prompt + completion, "labels": labels, "prompt_length": len(prompt)}

    encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="Tokenizing demonstrations")
    prompt_limit = max_prompt_length or max_length
    kept = encoded.filter(lambda row: len(row["input_ids"]) <= max_length and row["prompt_length"] <= prompt_limit)
    if len(kept) == 0:
        raise InstructGPTError(
            f"{where}: every demonstration is longer than max_length={max_length} tokens or its prompt than "
            f"max_prompt_length={prompt_limit} (the shortest has {min(map(len, encoded['input_ids']))} tokens, its "
            f"shortest prompt {min(encoded['prompt_length'])})."
        )
    return kept.remove_columns("prompt_length"), {"dropped_too_long": len(encoded) - len(kept)}


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
