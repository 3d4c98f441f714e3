"""Prompt format: one rendering of prompts and completions for every stage.

The SFT stage chooses it, `stage.json` records it, and the reward model, PPO, evaluation and cards apply the record. A
prompt is a string or a list of chat messages; a completion is a string or one assistant message. They are tokenized
separately and concatenated, so training sees exactly the ids that generation produces, and every finished completion
ends with one EOS token.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from instructgpt_hf.config.data import PLAIN_TEMPLATES
from instructgpt_hf.data import special_text
from instructgpt_hf.data.messages import Prompt, to_messages
from instructgpt_hf.data.values import short
from instructgpt_hf.errors import InstructGPTError, first_line, nearest

Completion = str | list[dict[str, str]]
_PROBE = "[[completion]]"  # a text that no template contains, to find what is written before and after a text
_SLOT, _USER_SLOT = "{prompt}", "User: {prompt}"  # in plain templates
# A plain format as a chat template; the words in capitals are texts of the format.
_PLAIN_CHAT = """
{%- set done = not add_generation_prompt and messages[-1]['role'] == 'assistant' -%}
{%- set turns = messages[:-1] if done else messages -%}
{{- LEAD -}}
{%- if turns | length == 1 -%}
  {%- set text = HEAD + turns[0]['content'] -%}
  {{- (text if text.startswith(' ') else SPACE + text) -}}
{%- else -%}
  {{- SPACE + START -}}
  {%- for turn in turns -%}
    {{- turn['role'] | capitalize + ': ' + turn['content'] + ('' if loop.last else NEWLINE) -}}
  {%- endfor -%}
{%- endif -%}
{%- if done or add_generation_prompt -%}{{- TAIL -}}{%- endif -%}
{%- if done -%}{{- PREFIX + messages[-1]['content'] + EOS -}}{%- endif -%}
"""


class RenderingError(InstructGPTError):
    """Raised where the prompt format cannot render a row."""


@dataclass(frozen=True)
class PromptFormat:
    """Rendering of prompts and completions as tokens.

    Attributes:
        name: `"chat"` (the tokenizer's chat template) or a key of `PLAIN_TEMPLATES`.
        template: the plain template with `{prompt}`, or the tokenizer's chat template.
        completion_prefix: separates a plain completion from its prompt, such as one space.
        eos_token: the token that ends every completion.
        pad_token: the padding token; never the EOS token, because a reward model's score is read at the last token
            that is not padding.
    """

    name: str
    template: str
    completion_prefix: str
    eos_token: str
    pad_token: str

    @classmethod
    def create(cls, name: str, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Make the format called `name` for a tokenizer that has distinct EOS and padding tokens.

        `"chat:<name>"` is one of several chat templates of a tokenizer, of which `"chat"` is the default one.

        Raises:
            InstructGPTError: if the name is unknown, the tokenizer has no chat template to render `"chat"` with, or
                its EOS and padding tokens are missing or equal.
        """
        if tokenizer.eos_token is None or tokenizer.pad_token is None or tokenizer.eos_token == tokenizer.pad_token:
            raise InstructGPTError(
                f"tokenizer {tokenizer.name_or_path!r}: eos_token {tokenizer.eos_token!r} and pad_token "
                f"{tokenizer.pad_token!r} must both exist and differ, or a reward model reads its score one token "
                "early. Let `instructgpt_hf.models.loading.load_tokenizer` add a padding token."
            )
        templates = {**PLAIN_TEMPLATES, **_chat_templates(tokenizer)}
        if name == "chat" and name not in templates:
            named = ", ".join(sorted(templates.keys() - PLAIN_TEMPLATES.keys()))
            has = f"has no default one; choose {named}, or" if named else "has none. Choose"
            raise InstructGPTError(
                f"prompt_template: 'chat' needs a chat template, and tokenizer {tokenizer.name_or_path!r} {has} "
                f"a plain template: {', '.join(sorted(PLAIN_TEMPLATES))}."
            )
        if name not in templates:
            raise InstructGPTError(f"prompt_template: {name!r} is not known; {nearest(name, templates)}")
        kind = "chat" if name not in PLAIN_TEMPLATES else name
        return cls(kind, *templates[name], tokenizer.eos_token, tokenizer.pad_token)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptFormat:
        """The format that `to_dict` recorded."""
        return cls(**{key: values[key] for key in ("name", "template", "completion_prefix", "eos_token", "pad_token")})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with a hash of the format."""
        return {**asdict(self), "sha256": hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:16]}

    def check_same(self, other: PromptFormat, where: str) -> None:
        """Raise InstructGPTError if `other` renders differently, naming the fields that differ and both values."""
        mine, theirs = asdict(self), asdict(other)
        differing = [key for key in mine if mine[key] != theirs[key]]
        if differing:
            detail = "; ".join(
                f"{key}: {short(mine[key], 40)} there, {short(theirs[key], 40)} here" for key in differing
            )
            raise InstructGPTError(
                f"{where}: the prompt format differs from the one the SFT model was trained with ({detail}). "
                "Remove the setting to use the recorded format, or train every stage with the new one."
            )

    def prompt_text(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
        """The rendered prompt, which the model completes."""
        return special_text.unmark(self._marked_prompt(prompt, tokenizer))

    def _marked_prompt(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
        """The rendered prompt, with marks where the data spell a special token."""
        if self.template == _SLOT and isinstance(prompt, str):  # the model reads the text as it is, no turns
            return special_text.mark(prompt, tokenizer)
        turns = _marked_turns(prompt, tokenizer)
        if self.name == "chat":
            return self._conversation(turns, tokenizer, add_generation_prompt=True)
        if len(turns) == 1:
            return self.template.replace(_SLOT, turns[0]["content"])
        lines = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
        return self.template.replace(self._conversation_slot, lines)

    @property
    def _conversation_slot(self) -> str:
        """The part of a plain template that the lines of a conversation replace: they name their roles themselves."""
        return _USER_SLOT if _USER_SLOT in self.template else _SLOT

    def prompt_ids(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the rendered prompt, with the special tokens that the tokenizer starts a plain text with.

        Those that some tokenizers end a text with, such as EOS, are left out: the completion follows. A special token
        that the prompt spells is ordinary text.

        Raises:
            RenderingError: if the chat template refuses the conversation.
        """
        ids = special_text.encode(self._marked_prompt(prompt, tokenizer), tokenizer)
        return ids if self.name == "chat" else [*framing_ids(tokenizer)[0], *ids]

    def completion_ids(
        self, prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase, finished: bool = True
    ) -> list[int]:
        """Token ids of a completion, ending with exactly one EOS token.

        A chat completion is what the template writes after the generation prompt, up to the first EOS: generation
        stops there, so the newline that some templates write after an end-of-turn token is cut. EOS at the end of the
        given text is left out; a special token elsewhere in it is ordinary text.

        Args:
            prompt: the prompt that is completed.
            completion: text, or one assistant message.
            tokenizer: tokenizer of the model that reads the completion.
            finished: False for a completion that was truncated: no EOS and no end of turn.

        Raises:
            RenderingError: if the chat template refuses the conversation, or does not render the completion as a
                continuation of the prompt.
        """
        plain = completion if isinstance(completion, str) else completion[-1]["content"]
        plain = special_text.mark(re.sub(rf"(?:{re.escape(self.eos_token)}\s*)+$", "", plain), tokenizer)
        text = self._completion(prompt, plain, tokenizer)
        if not finished:
            text = text.removesuffix(self._frame(prompt, tokenizer)[1])
        ids = special_text.encode(text, tokenizer)
        return [*ids, tokenizer.convert_tokens_to_ids(self.eos_token)] if finished else ids

    def _completion(self, prompt: Prompt, completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What follows the rendered prompt, up to EOS, with the marks of both."""
        if self.name != "chat":
            return self.completion_prefix + completion
        before = self._marked_prompt(prompt, tokenizer)
        turns = [*_marked_turns(prompt, tokenizer), {"role": "assistant", "content": completion}]
        whole = self._conversation(turns, tokenizer)
        if not whole.startswith(before):
            raise RenderingError(
                "the chat template does not render a completion as a continuation of its prompt (templates that "
                "drop earlier thinking blocks do this); choose a plain prompt_template instead"
            )
        return whole[len(before) :].split(self.eos_token)[0]

    def _frame(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """What the format writes before a completion and between it and EOS."""
        before, _, after = self._completion(prompt, _PROBE, tokenizer).rpartition(_PROBE)
        return before, after

    def _conversation(
        self, turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
    ) -> str:
        """The turns in the chat template."""
        try:
            return tokenizer.apply_chat_template(
                turns, chat_template=self.template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:  # whatever the template's code raises
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise RenderingError(
                f"the chat template refuses a conversation with the roles {roles}: {first_line(error)}. Change its "
                "turns, or choose a plain prompt_template"
            ) from error

    def completion_text(self, prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of a completion from its ids, the inverse of `completion_ids`.

        EOS, padding and what the format writes around a completion are left out; white space of the completion stays.
        """
        text = _decoded(ids, tokenizer)
        try:
            frame = self._frame(prompt, tokenizer)
        except RenderingError:  # a template that renders prompts only
            frame = ("", "")
        before = _decoded(special_text.encode(frame[0], tokenizer), tokenizer)
        # Behind a letter, because some tokenizers put a space before a text.
        after = _decoded(special_text.encode(f"a{frame[1]}", tokenizer), tokenizer).partition("a")[2]
        if tokenizer.convert_tokens_to_ids(self.eos_token) in ids:
            text = text.removesuffix(after)
        return text.removeprefix(before or _added_space(text, tokenizer))

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """A chat template with which `tokenizer.apply_chat_template` gives `prompt_ids`, for a plain format too.

        A conversation whose last turn is the assistant's, without the generation prompt, is a prompt with its
        completion and EOS. There the ids are those of `completion_ids` unless the tokenizer joins the end of the
        prompt and the start of the completion to one token.
        """
        if self.name == "chat":
            return self.template
        head, tail = self.template.split(_SLOT)
        lead, space = _leading_text(tokenizer)
        parts = {
            "LEAD": lead,
            "SPACE": space,
            "HEAD": head,
            "START": self.template.split(self._conversation_slot)[0],
            "NEWLINE": "\n",
            "TAIL": tail,
            "PREFIX": self.completion_prefix,
            "EOS": self.eos_token,
        }
        written = {name: json.dumps(text, ensure_ascii=False) for name, text in parts.items()}
        return re.sub("|".join(parts), lambda found: written[found[0]], _PLAIN_CHAT)

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
        """Write a tokenizer whose chat template is this format, as chat programs and `pipeline` will use it."""
        given, tokenizer.chat_template = tokenizer.chat_template, self.chat_template(tokenizer)
        try:
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.chat_template = given


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, str]]:
    """The tokenizer's chat template as `chat`; of several, each as `chat:<name>`, the default one also as `chat`."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        named = {f"chat:{name}": template for name, template in found.items()}
        found = found.get("default")
    else:
        named = {}
    templates = {"chat": found, **named} if found else named
    return {name: (template, "") for name, template in templates.items()}


def framing_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that a tokenizer puts before and behind every text."""
    if tokenizer.num_special_tokens_to_add() == 0:  # spares most tokenizers two calls for every prompt
        return [], []
    framed, text = tokenizer(_PROBE)["input_ids"], tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    last = len(framed) - len(text)
    start = next((start for start in range(last, -1, -1) if framed[start : start + len(text)] == text), last)
    return framed[:start], framed[start + len(text) :]


def _leading_text(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The special tokens before every text, and the space that keeps the ids of a text behind them, if one has to."""
    lead = framing_ids(tokenizer)[0]
    text = "".join(tokenizer.convert_ids_to_tokens(lead))
    wanted = [*lead, *tokenizer(_PROBE, add_special_tokens=False)["input_ids"]]
    # Some tokenizers put a space before a text, and none behind a special token.
    spaces = ("", " ") if lead else ("",)
    ids = {space: tokenizer(f"{text}{space}{_PROBE}", add_special_tokens=False)["input_ids"] for space in spaces}
    return text, next((space for space in spaces if ids[space] == wanted), "")


def _marked_turns(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The turns of a prompt, with marks where they spell a special token."""
    return [{**turn, "content": special_text.mark(turn["content"], tokenizer)} for turn in to_messages(prompt)]


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of token ids as it is behind other text: without special tokens and with all of its white space."""

    def decode(items: list[int]) -> str:
        return tokenizer.decode(items, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # Some decoders drop a space at the start.
    first = special_text.encode("a", tokenizer)
    return decode([*first, *ids])[len(decode(first)) :]


def _added_space(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The space that the tokenizer put before a text, if it did."""
    plain, spaced = (_decoded(special_text.encode(item, tokenizer), tokenizer) for item in ("a", "  a"))
    # Most of the tokenizers that put one put none before a text that starts with one.
    always = spaced == "   a"
    return " " if plain == " a" and (always or not text.startswith("  ")) else ""
