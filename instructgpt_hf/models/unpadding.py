"""Batches of prompts and completions without most of their padding, and logits of the completions' tokens alone.

Most positions of a batch can be padding, whose logits, over 50k or more tokens, cost as much as those of tokens.
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
    """A batch whose rows begin with their first token, and the places of the N completion tokens."""

    input_ids: Tensor  # [B, W], padded right; W is the length of the longest row without padding
    attention_mask: Tensor  # [B, W]
    prompt_lengths: Tensor  # [B]
    rows: Tensor  # [N] row of each completion token, row by row
    steps: Tensor  # [N] its place in its completion, from 0
    shape: tuple[int, int]  # (B, T), T the longest completion with padding

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Completions:
        """Make the batch from ids [B, S]: prompts padded left, then T positions of completions padded right."""
        mask, shape = attention_mask.bool(), (input_ids.shape[0], completion_length)
        places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        lengths = mask[:, :-completion_length].sum(1)
        rows, steps = mask[:, -completion_length:].nonzero(as_tuple=True)
        return cls(input_ids.gather(1, places), attention_mask.gather(1, places), lengths, rows, steps, shape)

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
    """Logits [1, N, V] of a causal language model, whole or PEFT, that predict the completion tokens.

    A hook picks their positions from the input of the unembedding; the rest of the forward pass stays as it is.
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
