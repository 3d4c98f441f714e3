"""Preference pairs: what chosen and rejected share is the prompt, which is read and never made up.

A pair's prompt is a column, the messages that both conversations begin with, or the turns of both transcripts in the
form of Anthropic's HH-RLHF ("Human: ... Assistant: ..."). Texts without any of these are refused: letters that two
answers happen to begin with are no prompt.
"""

from __future__ import annotations

import re

from instructgpt_hf.data.files import Row
from instructgpt_hf.data.messages import (
    Messages,
    Prompt,
    as_messages,
    is_transcript,
    open_transcript,
    to_messages,
    transcript_turns,
    turn_breaks,
    turn_gap,
)
from instructgpt_hf.data.schemas import PROMPTS, has_prompt, read_prompt
from instructgpt_hf.data.values import WrongRow, short
from instructgpt_hf.errors import InstructGPTError


def check_prompts(head: list[Row], where: str) -> None:
    """Raise InstructGPTError if the pairs of a dataset's first rows are texts that hold no prompt.

    TRL would cut the letters that both begin with, also in mid-word.
    """
    first = head[0]
    if has_prompt(first) or not all(isinstance(first.get(name), str) for name in ("chosen", "rejected")):
        return
    if as_messages(first["chosen"], "chosen") or any(is_transcript(row.get("chosen")) for row in head):
        return
    raise InstructGPTError(
        f"{where}: missing column 'prompt'; it has {', '.join(map(repr, first))}. Pairs of text need a column with "
        f"the prompt ({', '.join(PROMPTS)}), or must be transcripts ('\\n\\nHuman: ...\\n\\nAssistant: ...') or "
        "lists of messages, which hold it."
    )


def repeats_prompt(head: list[Row]) -> bool:
    """Whether chosen and rejected of all of a dataset's first rows begin with the text of their prompt.

    One answer may begin with its prompt by chance, so a single row says nothing about itself.
    """
    return has_prompt(head[0]) and all(map(_begins_with_prompt, head))


def _begins_with_prompt(row: Row) -> bool:
    try:
        prompt = read_prompt(row)
    except WrongRow:
        return False
    texts = row.get("chosen"), row.get("rejected")
    return isinstance(prompt, str) and all(isinstance(text, str) and _after(prompt, text) for text in texts)


def _after(prompt: str, text: str) -> str | None:
    """What follows the prompt in a text, without the space between; None if the text does not begin with it."""
    start = prompt.strip()
    found = text.lstrip()
    rest = found[len(start) :]
    if not found.startswith(start) or (start[-1:].isalnum() and rest[:1].isalnum()):
        return None
    return rest.strip()


def read_pair(row: Row, repeated: bool = False) -> Row:
    """TRL's preference pairs: texts, messages, or one message each, as text in CSV files.

    Args:
        row: columns `chosen`, `rejected` and maybe a prompt.
        repeated: whether both texts of the dataset's rows begin with the prompt, which is then cut from them.

    Raises:
        WrongRow: if both do not continue one prompt.
    """
    prompt = read_prompt(row) if has_prompt(row) else None
    chosen, rejected = (as_messages(row.get(name), name) or row.get(name) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[:-1] != rejected[:-1]:
            raise WrongRow("chosen and rejected do not continue the same conversation", tolerable=True)
        prompt = joined(prompt, chosen[:-1])
        chosen, rejected = chosen[-1:], rejected[-1:]
    elif is_transcript(chosen) and is_transcript(rejected):
        pair = read_transcripts({"chosen": chosen, "rejected": rejected})
        return pair | {"prompt": joined(prompt, pair["prompt"])}
    elif repeated and isinstance(prompt, str):
        chosen, rejected = (_after(prompt, text) if isinstance(text, str) else text for text in (chosen, rejected))
    if prompt is None:
        raise WrongRow("prompt: missing, and chosen and rejected are no conversations that hold it")
    return {"prompt": prompt, "completions": [chosen, rejected], "ranks": [1, 2]}


def joined(prompt: Prompt | None, turns: Messages) -> Prompt:
    """The longer of a prompt and the turns before the answers, of which one must be a part of the other.

    Raises:
        WrongRow: if they are two different conversations.
    """
    if not turns and prompt is not None:
        return prompt
    if prompt is None:
        return turns
    mine, theirs = _said(to_messages(prompt)), _said(turns)
    if mine == theirs:
        return turns if isinstance(prompt, str) and open_transcript(prompt) else prompt
    if mine in (theirs[-len(mine) :], theirs[: len(mine)]):
        return turns
    if mine[-len(theirs) :] == theirs:
        return prompt
    raise WrongRow(
        f"prompt: found {short(prompt)}, but chosen and rejected continue {short(turns)}; one must hold the other"
    )


def _said(turns: Messages) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def read_transcripts(row: Row) -> Row:
    """HH-RLHF: two transcripts that share all turns but the assistant's last one."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return {"prompt": [], "completions": [chosen, rejected], "ranks": [None, None]}
    breaks = [found for found in turn_breaks(chosen).finditer(chosen) if found[1] == "Assistant"]
    end = next((found.end() for found in reversed(breaks) if rejected.startswith(chosen[: found.end()])), None)
    if end is None:  # the conversations have nothing in common
        return {"prompt": [], "completions": [chosen, rejected], "ranks": [None, None]}
    completions = [text[end:].strip() for text in (chosen, rejected)]
    # Where they differ before their last turn, there is no ranking.
    single = not any(found[1] == "Human" for text in completions for found in _inner(text, chosen))
    return {
        "prompt": transcript_turns(chosen[:end]),
        "completions": completions,
        "ranks": [1, 2] if single else [None, None],
    }


def _inner(completion: str, transcript: str) -> list[re.Match[str]]:
    """Turns that begin inside a completion."""
    return list(re.finditer(rf"{turn_gap(transcript)}(Human|Assistant):", completion))
