"""Scores of token sequences and of text by a sequence classifier with a scalar head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.models.inputs import evaluation_mode, last_token_index, model_inputs
from instructgpt_hf.models.reward_model import HEAD, Scorer


def reward_shift(model: Scorer) -> float:
    """Mean raw score of demonstrations, subtracted so that they score 0 on average (InstructGPT §3.5)."""
    return float(getattr(model.config, "reward_shift", 0.0) or 0.0)


def token_scores(model: Scorer, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Shifted score at every position.

    Args:
        model: sequence classifier with a scalar head, whole, PEFT or on a shared base.
        input_ids: [B, S].
        attention_mask: [B, S]; padding on either side.

    Returns:
        [B, S] float32.
    """
    inner = unwrap_peft(model)
    backbone = getattr(inner, inner.base_model_prefix)
    hidden = backbone(**model_inputs(model, input_ids, attention_mask)).last_hidden_state
    head = getattr(inner, HEAD)
    # Outside autocast: a scalar of several units loses a tenth of one in bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        scores = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    return scores - reward_shift(model)


def sequence_scores(model: Scorer, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Shifted score at the last token of each sequence, whatever the padding side.

    Args:
        input_ids: [B, S], each row a prompt, a completion and its EOS token.
        attention_mask: [B, S].

    Returns:
        [B] float32.
    """
    scores = token_scores(model, input_ids, attention_mask)
    return scores.gather(1, last_token_index(attention_mask)[:, None]).squeeze(1)


@torch.no_grad()
def score_token_lists(model: Scorer, sequences: list[list[int]], pad_token_id: int, batch_size: int) -> list[float]:
    """Shifted scores of token lists, each a prompt, a completion and its EOS token.

    Sequences of similar length share a batch; the result is in the order given.
    """
    device = next(model.parameters()).device
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [torch.tensor(sequences[row], device=device) for row in rows]
            ids = pad_sequence(batch, batch_first=True, padding_value=pad_token_id)
            mask = pad_sequence([torch.ones_like(item) for item in batch], batch_first=True)
            for row, score in zip(rows, sequence_scores(model, ids, mask).tolist(), strict=True):
                scores[row] = score
    return scores


class TextRewardModel:
    """A reward model with a tokenizer or prompt format of its own, which scores text instead of token ids.

    The text is rendered as in the reward model's training. A finished completion ends with the reward model's EOS, an
    unfinished one with its last word.

    Args:
        model: sequence classifier with a scalar head; its shift is applied.
        tokenizer: the model's, with a padding token that differs from EOS.
        prompt_format: how the model was trained to read prompts; its tokenizer's chat template by default.

    Raises:
        InstructGPTError: if there is no chat template to default to, or the tokenizer's EOS and padding are unusable.
    """

    def __init__(
        self, model: Scorer, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format or PromptFormat.create("chat", tokenizer)

    def token_lists(
        self, prompts: Sequence[Prompt], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Token ids of each prompt with its completion; the score is read at the last id."""
        return [
            self.prompt_format.prompt_ids(prompt, self.tokenizer)
            + self.prompt_format.completion_ids(prompt, completion, self.tokenizer, finished=ended)
            for prompt, completion, ended in zip(prompts, completions, finished, strict=True)
        ]
