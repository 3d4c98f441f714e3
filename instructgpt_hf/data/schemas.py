"""The columns in which datasets keep prompts and demonstrations; one table for all stages.

Rankings have their own table (`data.rankings.schemas`), whose prompts are read from these columns, too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from instructgpt_hf.data.files import Row
from instructgpt_hf.data.messages import (
    Messages,
    Prompt,
    as_answer,
    as_conversation,
    as_messages,
    as_prompt,
    demonstrations_of,
    to_messages,
    unweighted,
    with_system,
)
from instructgpt_hf.data.values import RENAME, WrongRow, as_list, is_text, short

# Of several columns in a dataset, the first one is read.
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", *CONVERSATIONS, "instruction", "question", "query")
# What Alpaca (`input`) and Dolly (`context`) keep beside an instruction, and other files beside a question.
INPUTS = ("input", "context")
WITH_INPUT = ("instruction", "question")
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("completion", "response", *CONVERSATIONS, "output", "answer")
TEXT = "text"


def first_of(names: Collection[str], columns: Collection[str]) -> str | None:
    """The first of `names` among `columns`, or None."""
    return next((name for name in names if name in columns), None)


def has_prompt(columns: Collection[str]) -> bool:
    """Whether a prompt can be read from these columns."""
    return first_of(PROMPTS, columns) is not None


def read_prompt(row: Row) -> Prompt:
    """The prompt of a row, from the first of `PROMPTS` and from what stands beside it.

    Of a conversation, the turns of the assistant at the end are left out: they are the answer.

    Raises:
        WrongRow: if the row has no prompt, or one that cannot be used.
    """
    column = first_of(PROMPTS, row)
    if column is None:
        raise WrongRow(f"prompt: missing; it has {', '.join(map(repr, row)) or 'no columns'}")
    value = row[column]
    if column in CONVERSATIONS:
        turns = as_messages(value, column)
        if turns is not None:
            asked = [number for number, turn in enumerate(turns, start=1) if turn["role"] != "assistant"]
            if not asked:
                raise WrongRow(f"{column}: found {short(value)}, in which only the assistant speaks", tolerable=True)
            value = turns[: asked[-1]]
    prompt = as_prompt(value, column)
    if column in WITH_INPUT and isinstance(prompt, str):
        prompt = _with_input(prompt, row)
    return _with_system(_with_history(prompt, row), row)


def read_demonstration(row: Row, columns: Collection[str]) -> list[Row]:
    """The demonstrations of a row: `prompt` (text or messages) and `completion` (text).

    A conversation, or a completion of several turns, is one demonstration for each turn of the assistant. A row with
    no prompt but `text` is one whose prompt is None: the model learns all of its text.

    Args:
        row: the row.
        columns: columns of the dataset, of which the first of `ANSWERS` holds the answers.

    Raises:
        WrongRow: if it cannot be used.
    """
    answer = first_of(ANSWERS, columns)
    if answer is None:
        if not is_text(row.get(TEXT)):
            blank = row.get(TEXT) in (None, "")
            raise WrongRow(f"{TEXT}: found {short(row.get(TEXT))}, expected non-empty text", tolerable=blank)
        return [{"prompt": None, "completion": row[TEXT]}]
    if answer in CONVERSATIONS:
        found = demonstrations_of(as_conversation(row.get(answer), answer), unweighted(row.get(answer), answer))
        if not found:
            raise WrongRow(f"{answer}: every turn of the assistant has the weight 0", tolerable=True)
        return [{**item, "prompt": _with_system(item["prompt"], row)} for item in found]
    prompt, turns = read_prompt(row), as_answer(row.get(answer), answer)
    if len(turns) == 1:
        return [{"prompt": prompt, "completion": turns[0]["content"]}]
    before = to_messages(prompt)
    return demonstrations_of([*before, *turns], range(len(before)))


def _with_input(prompt: str, row: Row) -> str:
    """An instruction and, behind it, the text that it is about."""
    beside = first_of(INPUTS, row)
    value = row[beside] if beside is not None else None
    if value is None or value == "":
        return prompt
    if not isinstance(value, str):
        raise WrongRow(f"{beside}: found {short(value)}, expected text to put behind the prompt; {RENAME}")
    return f"{prompt}\n\n{value}" if value.strip() else prompt


def _with_history(prompt: Prompt, row: Row) -> Prompt:
    """A prompt behind LLaMA-Factory's earlier turns, a list of [user, assistant]."""
    pairs = as_list(row.get("history") or [], "history")
    if pairs == []:
        return prompt
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_text, pair)) for pair in pairs
    ):
        raise WrongRow(f"history: found {short(pairs)}, expected a list of [user's text, assistant's text]; {RENAME}")
    earlier: Messages = []
    for said, answered in pairs:
        earlier += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    return [*earlier, *to_messages(prompt)]


def _with_system(prompt: Any, row: Row) -> Prompt:
    column = first_of(SYSTEMS, row)
    return prompt if column is None else with_system(prompt, row[column], column)
