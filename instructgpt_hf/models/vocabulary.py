"""Token ids of a tokenizer beside the rows of a model: many models have more rows than their tokenizer has tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.errors import InstructGPTError


class Vocabulary:
    """The ids of a tokenizer's tokens. Other ids have probability 0: no text has them, and other models no rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = frozenset(tokenizer.get_vocab().values())
        self._others: dict[int, list[int]] = {}

    def others(self, size: int) -> list[int]:
        """The ids below `size` that are no token's."""
        if size not in self._others:
            self._others[size] = sorted(set(range(size)) - self.ids)
        return self._others[size]

    def exclude_others(self, logits: Tensor) -> Tensor:
        """Set the logits [..., V] of ids that are no token's to minus infinity, in place: a copy would be large."""
        others = self.others(logits.shape[-1])
        return logits.index_fill_(-1, torch.tensor(others, device=logits.device), -torch.inf) if others else logits

    def check_reader(self, model: Any, role: str) -> None:
        """Raise unless a model that reads the tokenizer's ids has a row for each of them.

        Raises:
            InstructGPTError: naming both numbers.
        """
        inner = unwrap_peft(getattr(model, "host", model))  # a scorer on a shared base has a `host`
        if not hasattr(inner, "get_input_embeddings"):
            return
        rows, needed = inner.get_input_embeddings().num_embeddings, max(self.ids) + 1
        if rows < needed:
            raise InstructGPTError(
                f"{role}: has embeddings for {rows} token ids, and the tokenizer whose ids it reads has {needed}. "
                "Choose a model of this tokenizer, or give it more rows with `resize_token_embeddings` and train it."
            )
