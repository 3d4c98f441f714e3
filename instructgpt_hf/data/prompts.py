"""Prompt format: one rendering of prompts and completions for every stage.

The SFT stage chooses it, `stage.json` records it, and the reward model, PPO, evaluation and cards apply the record. A
prompt is a string or a list of chat messages; a completion is a string or one assistant message. They are tokenized
separately and concatenated, so training sees exactly the ids that generation produces, and every finished completion
ends with one EOS token.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from instructgpt_hf.config.data import PLAIN_TEMPLATES
from instructgpt_hf.data.messages import Prompt
from instructgpt_hf.data.values import short
from instructgpt_hf.errors import InstructGPTError, nearest

Completion = str | list[dict[str, str]]
_PROBE = "[[completion]]"  # a text that no template contains, to find what is written before and after a text


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
        templates = {**PLAIN_TEMPLATES, "chat": (tokenizer.chat_template, "")}
        if name not in templates:
            raise InstructGPTError(f"prompt_template: {name!r} is not known; {nearest(name, templates)}")
        if name == "chat" and not tokenizer.chat_template:
            raise InstructGPTError(
                f"prompt_template: 'chat' needs a chat template, and tokenizer {tokenizer.name_or_path!r} has none. "
                f"Choose a plain template: {', '.join(sorted(PLAIN_TEMPLATES))}."
            )
        return cls(name, *templates[name], tokenizer.eos_token, tokenizer.pad_token)

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
        if self.name != "chat":
            return self.template.replace("{prompt}", _plain_text(prompt))
        return tokenizer.apply_chat_template(
            _messages(prompt), chat_template=self.template, add_generation_prompt=True, tokenize=False
        )

    def prompt_ids(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the rendered prompt, with the special tokens that the tokenizer starts a plain text with.

        Those that some tokenizers end a text with, such as EOS, are left out: the completion follows.
        """
        text = self.prompt_text(prompt, tokenizer)
        if self.name == "chat":
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text)["input_ids"]
        return ids[: len(ids) - len(framing_ids(tokenizer)[1])]

    def completion_ids(
        self, prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase, finished: bool = True
    ) -> list[int]:
        """Token ids of a completion, ending with exactly one EOS token.

        A chat completion is what the template writes after the generation prompt, up to the first EOS: generation
        stops there, so the newline that some templates write after an end-of-turn token is cut.

        Args:
            prompt: the prompt that is completed.
            completion: text, or one assistant message.
            tokenizer: tokenizer of the model that reads the completion.
            finished: False for a completion that was truncated: no EOS and no end of turn.

        Raises:
            InstructGPTError: if the chat template does not render the completion as a continuation of the prompt.
        """
        plain = completion if isinstance(completion, str) else completion[-1]["content"]
        chat = self.name == "chat"
        text = self._chat_completion(prompt, plain, tokenizer) if chat else self.completion_prefix + plain
        if not finished and chat:
            text = text.removesuffix(self._chat_completion(prompt, _PROBE, tokenizer).rpartition(_PROBE)[2])
        text = text.split(self.eos_token)[0]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.convert_tokens_to_ids(self.eos_token)] if finished else ids

    def _chat_completion(self, prompt: Prompt, completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the chat template writes after the rendered prompt."""
        before = self.prompt_text(prompt, tokenizer)
        messages = [*_messages(prompt), {"role": "assistant", "content": completion}]
        whole = tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        if not whole.startswith(before):
            raise InstructGPTError(
                "the chat template does not render a completion as a continuation of its prompt (templates that "
                "drop earlier thinking blocks do this); choose a plain prompt_template instead."
            )
        return whole[len(before) :]

    def completion_text(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of a completion for people: without separator, EOS and padding."""
        return tokenizer.decode(ids, skip_special_tokens=True).strip()


def framing_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that a tokenizer puts before and behind every text."""
    if tokenizer.num_special_tokens_to_add() == 0:  # spares most tokenizers two calls for every prompt
        return [], []
    framed, text = tokenizer(_PROBE)["input_ids"], tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    last = len(framed) - len(text)
    start = next((start for start in range(last, -1, -1) if framed[start : start + len(text)] == text), last)
    return framed[:start], framed[start + len(text) :]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _plain_text(prompt: Prompt) -> str:
    """Text of a prompt for a plain template; several turns stand on lines of their own, with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)
