"""Stage 1 data: demonstrations, and the pretraining text mixed into them for the RL initialisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rows import check_rows, is_text, require_columns
from instructgpt_hf.errors import InstructGPTError

IGNORED = -100  # the label that PyTorch's cross entropy skips


def demonstration_rows(dataset: Dataset, where: str) -> Dataset:
    """A demonstrations dataset in its one form: columns `prompt` and `completion`.

    Accepts TRL's prompt-completion columns, `prompt`/`response`, and TRL's language-modelling `messages`, whose last
    turn is the completion.

    Raises:
        InstructGPTError: naming missing columns, or every wrong row.
    """
    if "messages" in dataset.column_names and not {"completion", "response"} & set(dataset.column_names):
        check_rows(dataset, where, _messages_problem)
        columns = [name for name in dataset.column_names if name not in ("prompt", "completion")]
        dataset = dataset.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1]["content"]},
            remove_columns=columns,
        )
    elif "response" in dataset.column_names and "completion" not in dataset.column_names:
        dataset = dataset.rename_column("response", "completion")
    require_columns(dataset, ["prompt", "completion"], where)
    dataset = dataset.select_columns(["prompt", "completion"])
    check_rows(dataset, where, _row_problem)
    return dataset


def _messages_problem(row: dict[str, Any]) -> str | None:
    turns = row["messages"]
    if not is_text(turns):
        return "messages: expected a non-empty list of {'role', 'content'}"
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        return "messages: the last of at least two turns must be the assistant's"
    return None


def _row_problem(row: dict[str, Any]) -> str | None:
    for column in ("prompt", "completion"):
        if not is_text(row[column]):
            return f"{column}: found {row[column]!r}, expected non-empty text or chat messages"
    return None


def tokenize_demonstrations(
    dataset: Dataset,
    prompt_format: PromptFormat,
    tokenizer: Any,
    max_length: int,
    where: str,
    max_prompt_length: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Token ids and labels; the prompt's labels are ignored, the completion's EOS is not.

    Args:
        dataset: columns `prompt`, `completion`.
        max_length: longest prompt + completion kept, in tokens.
        max_prompt_length: longest prompt kept, in tokens.

    Returns:
        Dataset with `input_ids` and `labels`, and the count of demonstrations dropped for their length. A truncated
        demonstration would teach the model not to stop.

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
    """Demonstrations with pretraining examples among them (InstructGPT appendix C.3).

    The paper does not state whether its 10 % counts tokens or examples; here it counts examples.

    Args:
        demonstrations: columns `input_ids`, `labels`.
        blocks: endless packed token blocks; every token of one is trained on.
        fraction: share of the mixed examples that is pretraining text, in [0, 1).
        seed: order of the mixture.
    """
    count = round(len(demonstrations) * fraction / (1.0 - fraction))
    rows = [next(blocks) for _ in range(count)]
    ids = [*demonstrations["input_ids"], *rows]
    labels = [*demonstrations["labels"], *rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels}).shuffle(seed=seed)
