"""Pretraining text as an endless, resumable stream of packed token blocks (InstructGPT appendix C.3, C.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from instructgpt_hf.data.documents import documents_of
from instructgpt_hf.data.rows import check_rows, is_text, require_columns


def with_text(dataset: Dataset | IterableDataset, field: str, where: str) -> Dataset | IterableDataset:
    """The dataset with its column `field` alone, called `text`.

    Raises:
        InstructGPTError: if there is no such column.
    """
    if field == "text":
        return dataset
    if dataset.column_names is not None:  # of a stream they may be unknown until it is read
        require_columns(dataset, [field], where)
    return dataset.select_columns([field]).rename_column(field, "text")


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


def leading_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before every text."""
    start = tokenizer("")["input_ids"][:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


class PretrainingStream(Iterator[list[int]]):
    """Documents joined by EOS and cut into blocks of equal length.

    The stream is a function of its seed. Its blocks are dealt out to the processes in turn, so that any number of
    processes reads together what one process reads, and one that is resumed continues with the very next token,
    whatever the number of processes was before.

    Args:
        dataset: column `text`; shuffled anew in every pass (see `instructgpt_hf.data.documents`).
        tokenizer: its EOS token ends every document, and its beginning-of-text token, if it puts one before every
            text, begins it.
        block_length: tokens in a block.
        seed: order of the documents.
        process_index: this process gets every `num_processes`-th block, starting with this one.
        num_processes: how many processes share the stream.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: Any,
        block_length: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.documents = documents_of(dataset, seed)
        self.tokenizer = tokenizer
        self.leading = leading_ids(tokenizer)
        self.block_length = block_length
        self.process_index = process_index
        self.num_processes = num_processes
        self.cursor = 0  # of the next token in the present document
        self._document: list[int] = []

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*self.leading, *ids, self.tokenizer.eos_token_id]

    def _block(self) -> list[int]:
        block: list[int] = []
        while len(block) < self.block_length:
            if self.cursor == len(self._document):
                self._document, self.cursor = self._encode(self.documents.advance()), 0
            piece = self._document[self.cursor : self.cursor + self.block_length - len(block)]
            block += piece
            self.cursor += len(piece)
        return block

    def __next__(self) -> list[int]:
        # Where a block starts depends on the lengths of all documents before it, so every process reads them all.
        return [self._block() for _ in range(self.num_processes)][self.process_index]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON; the same on every process."""
        return {"documents": self.documents.state_dict(), "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        text = self.documents.load_state_dict(state["documents"])
        self._document, self.cursor = self._encode(text) if text is not None else [], state["cursor"]
