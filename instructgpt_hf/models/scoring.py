"""Scores of token sequences and of text by a sequence classifier with a scalar head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.models.inputs import evaluation_mode, last_token_index, map_by_length, model_inputs, padded
from instructgpt_hf.models.reward_model import HEAD, Scorer, head_scores
from instructgpt_hf.models.vocabulary import Vocabulary


def reward_shift(model: Scorer) -> float:
    """Mean raw score of demonstrations, subtracted so that they score 0 on average (InstructGPT §3.5)."""
    return float(getattr(model.config, "reward_shift", 0.0) or 0.0)


def token_scores(model: Scorer, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Shifted scores [B, S] in float32 at every position of ids [B, S], padded on either side.

    The model is a sequence classifier with a scalar head, whole, PEFT or on a shared base.
    """
    inner = unwrap_peft(model)
    backbone = getattr(inner, inner.base_model_prefix)
    hidden = backbone(**model_inputs(model, input_ids, attention_mask)).last_hidden_state
    return head_scores(getattr(inner, HEAD), hidden) - reward_shift(model)


def sequence_scores(model: Scorer, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Shifted scores [B] in float32 at the last token of each row of ids [B, S], padded on either side.

    A row is a prompt, a completion and its EOS token.
    """
    scores = token_scores(model, input_ids, attention_mask)
    return scores.gather(1, last_token_index(attention_mask)[:, None]).squeeze(1)


@torch.no_grad()
def score_token_lists(model: Scorer, sequences: list[list[int]], pad_token_id: int, batch_size: int) -> list[float]:
    """Shifted scores of N lists of token ids, each a prompt, a completion and its EOS token, in the order given."""
    device = next(model.parameters()).device

    def scores(rows: Sequence[Sequence[int]]) -> list[float]:
        return sequence_scores(model, *padded(rows, pad_token_id, device)).tolist()

    with evaluation_mode(model):
        return map_by_length(scores, sequences, batch_size, longest_first=False)


class TextRewardModel:
    """A reward model with a tokenizer or prompt format of its own, which scores text instead of token ids.

    The text is rendered as in the reward model's training. A finished completion ends with the reward model's EOS, an
    unfinished one with its last word.

    Args:
        model: sequence classifier with a scalar head; its shift is applied.
        tokenizer: the model's, with a padding token that differs from EOS.
        prompt_format: how the model was trained to read prompts; its tokenizer's chat template by default.

    Raises:
        InstructGPTError: if there is no chat template to default to, the tokenizer's EOS and padding are unusable, or
            the model has fewer embeddings than the tokenizer has tokens.
    """

    def __init__(
        self, model: Scorer, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompt_format = prompt_format or PromptFormat.create("chat", tokenizer)
        Vocabulary(tokenizer).check_reader(model, "reward model with a tokenizer of its own")

    def token_lists(
        self, prompts: Sequence[Prompt], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Token ids of each prompt with its completion; the score is read at the last id."""
        return [
            self.prompt_format.prompt_ids(prompt, self.tokenizer)
            + self.prompt_format.completion_ids(prompt, completion, self.tokenizer, finished=ended)
            for prompt, completion, ended in zip(prompts, completions, finished, strict=True)
        ]
