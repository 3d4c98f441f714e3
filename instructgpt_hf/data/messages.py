"""Chat messages as datasets write them: the one place that reads roles, contents and turns.

A prompt is text or messages; a message is `{"role", "content"}`, both text. ShareGPT's `from` and `value`, Capybara's
`input` and `output`, contents in parts, and messages written as JSON or Python text are converted; what cannot be
trained on is a `WrongRow`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from instructgpt_hf.data.values import RENAME, WrongRow, is_blank, is_text, parsed, short
from instructgpt_hf.errors import nearest

Messages = list[dict[str, str]]
Prompt = str | Messages

ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of transcripts as in Anthropic's HH-RLHF
# Names that ShareGPT, OpenAssistant and LLaMA-Factory files use.
ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
}
_OBJECTS = re.compile(r"\s*\[?\s*\{")
_WRITTEN_MESSAGES = re.compile(r"""\s*(array\()?\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_EXCHANGE = {"input", "output"}  # keys of a question and its answer


def as_messages(value: Any, column: str) -> Messages | None:
    """The messages that a value holds or writes as JSON or Python text, or None if it is something else.

    Raises:
        WrongRow: if a message is not one of text, naming its turn.
    """
    turns = _turns(value, column)
    return None if turns is None else [_message(turn, f"{column}: turn {n}") for n, turn in enumerate(turns)]


def unweighted(value: Any, column: str) -> set[int]:
    """Turns that a conversation marks as not to be learned, as OpenAI's fine-tuning does: `"weight": 0`."""
    turns = _turns(value, column) or []
    return {number for number, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("weight") == 0}


def _turns(value: Any, column: str) -> list[Any] | None:
    """The turns as they are written, of which at least one is a message; None if a value is no conversation."""
    if isinstance(value, str):
        value = _written(value, column)
    elif (
        isinstance(value, list) and value and all(isinstance(turn, dict) and set(turn) == _EXCHANGE for turn in value)
    ):
        roles = (("user", "input"), ("assistant", "output"))
        return [{"role": role, "content": turn[key]} for turn in value for role, key in roles]
    if isinstance(value, dict):
        value = [value]
    return value if isinstance(value, list) and any(map(_is_message, value)) else None


def _written(text: str, column: str) -> Any:
    """The value of a text that may write messages, else None; an object of another kind may be an answer in JSON."""
    if not _OBJECTS.match(text) and not _WRITTEN_MESSAGES.match(text):
        return None
    try:
        value = parsed(text, column)
    except WrongRow:
        if _WRITTEN_MESSAGES.match(text):
            raise
        return None
    role = _either(value, "role", "from") if isinstance(value, dict) else None
    return None if isinstance(value, dict) and str(role).lower() not in ROLE_NAMES else value


def as_prompt(value: Any, column: str = "prompt") -> Prompt:
    """Text, or messages that leave the next turn to the assistant.

    Raises:
        WrongRow: if it is neither, or blank.
    """
    messages = as_messages(value, column)
    if messages is None:
        if is_text(value):
            return value
        blank = value == [] or is_blank(value)
        raise WrongRow(f"{column}: found {short(value)}, expected non-empty text or chat messages", tolerable=blank)
    if not any(is_text(turn["content"]) for turn in messages):
        raise WrongRow(f"{column}: found {short(value)}, whose messages are empty", tolerable=True)
    if messages[-1]["role"] == "assistant":
        said = short(messages[-1]["content"], 40)
        raise WrongRow(f"{column}: the last turn, {said}, is the assistant's, so there is nothing to answer")
    return messages


def as_answer(value: Any, column: str) -> Messages:
    """Turns that begin and end with the assistant's: text, one assistant message, or a part of a conversation.

    Raises:
        WrongRow: if it is something else, naming the turn.
    """
    turns = as_messages(value, column)
    if turns is None:
        if is_text(value):
            return [{"role": "assistant", "content": value}]
        expected = "expected non-empty text or assistant messages"
        raise WrongRow(f"{column}: found {short(value)}, {expected}", tolerable=is_blank(value))
    for number in (0, len(turns) - 1):
        if turns[number]["role"] != "assistant":
            found = f"{turns[number]['role']!r} ({short(turns[number]['content'], 40)})"
            raise WrongRow(f"{column}: turn {number}: found role {found}, expected 'assistant'")
    _check_said(turns, column)
    return turns


def as_completion(value: Any, column: str) -> str:
    """Text of a completion that is text or one assistant message; raises `WrongRow` if it is something else."""
    turns = as_answer(value, column)
    if len(turns) > 1:
        raise WrongRow(f"{column}: found {len(turns)} turns, expected text or one assistant message")
    return turns[0]["content"]


def as_conversation(value: Any, column: str) -> Messages:
    """Messages in which the assistant answers: its turns are neither blank nor the first, and one is the last.

    Raises:
        WrongRow: if it is something else, naming the turn.
    """
    turns = as_messages(value, column)
    if turns is None:
        raise WrongRow(f"{column}: found {short(value)}, expected a non-empty list of {{'role', 'content'}}")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise WrongRow(f"{column}: the last of at least two turns must be the assistant's", tolerable=True)
    if turns[0]["role"] == "assistant":
        raise WrongRow(f"{column}: turn 0 is the assistant's, which answers nothing", tolerable=True)
    _check_said(turns, column)
    return turns


def demonstrations_of(turns: Messages, left_out: Collection[int] = ()) -> list[dict[str, Any]]:
    """One demonstration for every assistant turn but those left out: the turns before it are its prompt."""
    return [
        {"prompt": turns[:number], "completion": turn["content"]}
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant" and number not in left_out
    ]


def to_messages(prompt: Prompt) -> Messages:
    """A prompt as messages; text is one turn of the user, or the turns of a transcript that the assistant goes on."""
    if not isinstance(prompt, str):
        return prompt
    return open_transcript(prompt) or [{"role": "user", "content": prompt}]


def is_transcript(value: Any) -> bool:
    """Whether a value is text in the form "Human: ... Assistant: ...", each turn on a line of its own."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\nAssistant:" in value


def turn_gap(text: str) -> str:
    """What stands between the turns of a transcript: an empty line in HH-RLHF, a new line where there is none."""
    return "\n\n" if "\n\nAssistant:" in text else "\n"


def turn_breaks(text: str) -> re.Pattern[str]:
    """What begins a turn of a transcript, the first one too."""
    return re.compile(rf"(?:^\s*|{turn_gap(text)})(Human|Assistant):")


def transcript_turns(text: str) -> Messages:
    r"""Messages of a transcript "\n\nHuman: ...\n\nAssistant: ...", without an empty last turn."""
    parts = turn_breaks(text).split(text)
    if parts[0].strip():
        return []
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"role": _SPEAKERS[role], "content": words.strip()} for role, words in spoken]
    return turns[:-1] if turns and not turns[-1]["content"] else turns


def open_transcript(text: str) -> Messages:
    """Messages of a transcript that ends with an empty turn of the assistant; none of any other text."""
    ends = is_transcript(text) and text.rstrip().endswith("\nAssistant:")
    return transcript_turns(text) if ends else []


def with_system(prompt: Prompt, system: Any, column: str) -> Prompt:
    """A prompt behind the system's text, if there is any.

    Raises:
        WrongRow: if the text is none, or the messages begin with another system turn.
    """
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise WrongRow(f"{column}: found {short(system)}, expected text to put before the prompt; {RENAME}")
    if not system.strip():
        return prompt
    turns = to_messages(prompt)
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"].strip() != system.strip():
        said = short(turns[0]["content"], 40)
        raise WrongRow(f"{column}: found {short(system, 40)}, but the messages begin with the system turn {said}")
    return prompt


def _check_said(turns: Messages, column: str) -> None:
    """Raise `WrongRow` if an assistant turn is blank."""
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise WrongRow(f"{column}: turn {number}: the assistant's turn is empty", tolerable=True)


def _either(turn: dict[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))


def _message(turn: Any, where: str) -> dict[str, str]:
    if not _is_message(turn):
        raise WrongRow(f"{where}: found {short(turn)}, expected {{'role', 'content'}}")
    role = _either(turn, "role", "from")
    if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
        raise WrongRow(f"{where}: role {role!r} is not known; {nearest(str(role), ROLES)}")
    content = _either(turn, "content", "value")
    if content is None:
        calls = ", and calls tools" if turn.get("tool_calls") or turn.get("function_call") else ""
        raise WrongRow(
            f"{where} ({role}): content is null{calls}; only turns of text can be trained on", tolerable=not calls
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise WrongRow(f"{where} ({role}): it calls tools; only turns of text can be trained on")
    return {"role": ROLE_NAMES[role.lower()], "content": _text(content, f"{where} ({role})")}


def _text(content: Any, where: str) -> str:
    """Text of a content: itself, or its parts of text joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise WrongRow(f"{where}: content is {short(content)}, expected text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise WrongRow(f"{where}: content has the part {short(part)}; only parts of text can be trained on")
        texts.append(text)
    return "".join(texts)
