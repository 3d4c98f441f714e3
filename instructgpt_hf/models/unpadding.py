"""Batches of prompts and completions without most of their padding, and logits of the completions' tokens alone.

Prompts padded to the longest prompt and completions to the longest completion can make most positions of a batch
padding, and with a vocabulary of 50k or more the logits of padding cost as much as those of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.models.inputs import model_inputs


class Completions(NamedTuple):
    """A batch whose rows begin with their first token, and the places of the N completion tokens.

    Attributes:
        input_ids: [B, W], padded right; W is the length of the longest row without padding.
        attention_mask: [B, W].
        prompt_lengths: [B].
        rows: [N] row of each completion token, row by row.
        steps: [N] its place in its completion, from 0.
        shape: (B, T), T the longest completion with padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    rows: Tensor
    steps: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Completions:
        """Make the batch from prompts padded left and completions padded right.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S].
            completion_length: T, the number of last positions that are completions.
        """
        mask = attention_mask.bool()
        places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        prompts, completions = mask[:, :-completion_length], mask[:, -completion_length:]
        rows, steps = completions.nonzero(as_tuple=True)
        return cls(
            input_ids.gather(1, places),
            attention_mask.gather(1, places),
            prompts.sum(1),
            rows,
            steps,
            (input_ids.shape[0], completion_length),
        )

    @property
    def predictors(self) -> tuple[Tensor, Tensor]:
        """Row and column of the token before each completion token, whose logits predict it."""
        return self.rows, self.prompt_lengths[self.rows] + self.steps - 1

    @property
    def ids(self) -> Tensor:
        """Ids [N] of the completion tokens."""
        rows, columns = self.predictors
        return self.input_ids[rows, columns + 1]

    def spread(self, values: Tensor) -> Tensor:
        """Values [N] of the completion tokens as [B, T], 0 at padding."""
        return values.new_zeros(self.shape).index_put((self.rows, self.steps), values)


def completion_logits(policy: PreTrainedModel | PeftModel, batch: Completions) -> Tensor:
    """Logits [1, N, V] that predict the completion tokens.

    A hook picks their positions from the input of the unembedding, so that the rest of the architecture's forward pass
    stays as it is.

    Args:
        policy: causal language model, whole or PEFT.
        batch: prompts and completions.
    """
    shape, picked = batch.input_ids.shape, False

    def pick(_head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal picked
        if not arguments or arguments[0].shape[:2] != shape:
            return None
        picked = True
        return (arguments[0][batch.predictors][None], *arguments[1:])

    head = unwrap_peft(policy).get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        logits: Tensor = policy(**model_inputs(policy, batch.input_ids, batch.attention_mask)).logits
    finally:
        if hook is not None:
            hook.remove()
    # An architecture that does not call its unembedding module returns the logits of all positions.
    return logits if picked else logits[batch.predictors][None]
