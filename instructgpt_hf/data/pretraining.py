"""Pretraining text as an endless, resumable stream of packed token blocks (InstructGPT appendix C.3, C.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset

from instructgpt_hf.data.loading import check_rows, is_text, require_columns


def pretraining_rows(dataset: Dataset, where: str) -> Dataset:
    """A text dataset in its one form: the column `text`.

    Raises:
        InstructGPTError: if the column is missing or a row holds no text.
    """
    require_columns(dataset, ["text"], where)
    dataset = dataset.select_columns(["text"])
    check_rows(
        dataset,
        where,
        lambda row: None if is_text(row["text"]) else f"text: found {row['text']!r}, expected non-empty text",
    )
    return dataset


class PretrainingStream(Iterator[list[int]]):
    """Documents in a fresh random order each pass, joined by EOS and cut into blocks of equal length.

    The stream is a function of its seed and of how many blocks were taken, so `state_dict` is small and a resumed
    run continues with the very next token.

    Args:
        dataset: column `text`.
        tokenizer: its EOS token ends every document.
        block_length: tokens in a block.
        seed: order of the documents.
        process_index: this process takes every `num_processes`-th document of a pass, starting here.
        num_processes: how many processes share the stream.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        block_length: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.block_length = block_length
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.passes = 0
        self.position = -1  # of the present document in the order of this pass
        self.cursor = 0  # of the next token in the present document
        self._order = self._shuffled()
        self._document: list[int] = []

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        # A process with no document of its own would wait for ever; sharing beats stopping.
        return order[self.process_index :: self.num_processes] or order

    def _read(self) -> list[int]:
        text = self.dataset[self._order[self.position]]["text"]
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def _next_document(self) -> None:
        self.position, self.cursor = self.position + 1, 0
        if self.position == len(self._order):
            self.passes, self.position = self.passes + 1, 0
            self._order = self._shuffled()
        self._document = self._read()

    def __next__(self) -> list[int]:
        block: list[int] = []
        while len(block) < self.block_length:
            if self.cursor == len(self._document):
                self._next_document()
            piece = self._document[self.cursor : self.cursor + self.block_length - len(block)]
            block += piece
            self.cursor += len(piece)
        return block

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, as plain JSON."""
        return {"passes": self.passes, "position": self.position, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.passes, self.position, self.cursor = state["passes"], state["position"], state["cursor"]
        self._order = self._shuffled()
        self._document = self._read() if self.position >= 0 else []
