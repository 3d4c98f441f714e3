"""Text that spells a special token, such as an answer about EOS: it stays text, and only templates write the token.

`mark` the data's text before it is rendered, `encode` what was rendered.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARK = "\ufdd0"  # a noncharacter of Unicode: no text has it


class _Spelling(NamedTuple):
    """How a tokenizer reads the names of its special tokens as text."""

    names: re.Pattern[str]  # of the special tokens, longest first
    ids: set[int]  # of the special tokens but the unknown one, which also stands for ordinary text
    reader: Tokenizer | None  # reads marked names as text; None where the tokenizer is not of `tokenizers`


@functools.lru_cache(maxsize=16)
def _spelling(tokenizer: PreTrainedTokenizerBase, eos_token: str, _size: int) -> _Spelling:
    """`eos_token` and `_size` are arguments because a tokenizer changes with them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Where a blank or a single character is special, text has to mean it.
    names = sorted((name for name in added | {eos_token} if len(name.strip()) > 1), key=len, reverse=True)
    ids = set(tokenizer.convert_tokens_to_ids(names)) - {tokenizer.unk_token_id}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    reader = _marked_reader(backend) if isinstance(backend, Tokenizer) else None
    return _Spelling(re.compile("|".join(map(re.escape, names)) or "(?!)"), ids, reader)


def _marked_reader(backend: Tokenizer) -> Tokenizer:
    """A copy that finds special tokens first, and only then deletes the marks inside their names.

    So everything else about the tokenizer, such as its treatment of spaces around special tokens, is as it was.
    """
    parts = json.loads(backend.to_str())
    delete = {"type": "Replace", "pattern": {"String": _MARK}, "content": ""}
    rest = [parts["normalizer"]] if parts["normalizer"] else []
    parts["normalizer"] = {"type": "Sequence", "normalizers": [delete, *rest]}
    for token in parts["added_tokens"]:
        if token["special"]:  # those that are `normalized` would be looked for once the marks are deleted
            token["normalized"] = False
    parts["truncation"] = parts["padding"] = None
    return Tokenizer.from_str(json.dumps(parts))


def _of(tokenizer: PreTrainedTokenizerBase) -> _Spelling:
    return _spelling(tokenizer, tokenizer.eos_token, len(tokenizer))


def mark(text: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Mark every special token that a text spells; anything else, also what is no text, stays as it is."""
    if not isinstance(text, str):
        return text
    return _of(tokenizer).names.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", text)


def unmark(text: str) -> str:
    """The text without marks."""
    return text.replace(_MARK, "")


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a marked text, without the special tokens that the tokenizer puts around every text.

    The name of a marked token becomes the ids of its letters. Where the vocabulary has the name as a word too, it is
    read in two parts.
    """
    if _MARK not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    names, special, reader = _of(tokenizer)
    if reader is not None:
        ids = reader.encode(text, add_special_tokens=False).ids
        if sum(item in special for item in ids) == len(names.findall(text)):
            return ids
    return [item for part in text.split(_MARK) for item in tokenizer(part, add_special_tokens=False)["input_ids"]]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text in which every special token that it spells is text."""
    return encode(mark(text, tokenizer), tokenizer)
