"""Scores of token sequences and of text by a sequence classifier with a scalar head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.models.inputs import last_token_index, model_inputs
from instructgpt_hf.models.reward_model import HEAD

if TYPE_CHECKING:
    pass


def reward_shift(model: Any) -> float:
    """What is subtracted from the raw score so that demonstrations score 0 on average (InstructGPT §3.5)."""
    return float(getattr(model.config, "reward_shift", 0.0) or 0.0)


def token_scores(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The scalar head at every position, shifted.

    Args:
        model: sequence classifier with a scalar head, whole or PEFT.
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
        scores = head(hidden.to(head_dtype(head))).squeeze(-1).float()
    return scores - reward_shift(model)


def head_dtype(head: Any) -> torch.dtype:
    """Dtype of the head in use; a PEFT model keeps the frozen original beside the trained copy."""
    active = getattr(head, "active_adapters", None)
    if active and hasattr(head, "modules_to_save"):
        head = head.modules_to_save[active[0]]
    return next(head.parameters()).dtype


def sequence_scores(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The shifted score at the last real token of each sequence, whatever the padding side.

    Args:
        input_ids: [B, S], each row a prompt, a completion and its EOS token.
        attention_mask: [B, S].

    Returns:
        [B] float32.
    """
    scores = token_scores(model, input_ids, attention_mask)
    return scores.gather(1, last_token_index(attention_mask)[:, None]).squeeze(1)


@torch.no_grad()
def score_token_lists(model: Any, sequences: list[list[int]], pad_token_id: int, batch_size: int) -> list[float]:
    """Shifted scores of token lists, each a prompt, a completion and its EOS token.

    Sequences of similar length share a batch; the result is in the order given.
    """
    device = next(model.parameters()).device
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(sequences[row]) for row in rows)
        ids = torch.full((len(rows), width), pad_token_id, device=device)
        mask = torch.zeros((len(rows), width), dtype=torch.long, device=device)
        for index, row in enumerate(rows):
            length = len(sequences[row])
            ids[index, :length] = torch.tensor(sequences[row], device=device)
            mask[index, :length] = 1
        for row, score in zip(rows, sequence_scores(model, ids, mask).tolist(), strict=True):
            scores[row] = score
    model.train(was_training)
    return scores


class TextRewardModel:
    """A reward model with a tokenizer or prompt format of its own, which reads the text of an answer.

    The text is rendered as the model's own training rendered it. A finished answer ends with the model's own EOS, an
    unfinished one with its last word.

    Args:
        model: sequence classifier with a scalar head; its shift is applied.
        tokenizer: the model's, with a padding token that differs from EOS.
        prompt_format: how the model was trained to read prompts; its tokenizer's chat template by default.

    Raises:
        InstructGPTError: if there is no chat template to default to, or the tokenizer's EOS and padding are unusable.
    """

    def __init__(self, model: Any, tokenizer: Any, prompt_format: PromptFormat | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format or PromptFormat.create("chat", tokenizer)

    def token_lists(
        self, prompts: Sequence[Prompt], answers: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Token ids of each prompt with its answer; the score belongs to the last one."""
        return [
            self.prompt_format.prompt_ids(prompt, self.tokenizer)
            + self.prompt_format.completion_ids(prompt, answer, self.tokenizer, finished=ended)
            for prompt, answer, ended in zip(prompts, answers, finished, strict=True)
        ]
