"""Pretraining text as an endless, resumable stream of packed token blocks (InstructGPT appendix C.3, C.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.documents import ShuffledDocuments, StreamedDocuments
from instructgpt_hf.data.files import Rows, is_part, numbered
from instructgpt_hf.data.prompts import framing_ids
from instructgpt_hf.data.rows import first_columns, missing_columns
from instructgpt_hf.data.special_text import encode_text
from instructgpt_hf.data.values import short
from instructgpt_hf.errors import InstructGPTError, Problems


def with_text(dataset: IterableDataset, field: str, where: str) -> IterableDataset:
    """Reduce a stream to its column `field`, renamed to `text`; raises InstructGPTError if its first rows lack it."""
    _require(dataset, field, where)
    dataset = dataset.select_columns([field])
    return dataset if field == "text" else dataset.rename_column(field, "text")


def pretraining_rows(rows: Rows, where: str, field: str = "text") -> Dataset:
    """Documents in the column `text`, from the column `field`; blank ones are left out, as in a stream.

    Raises:
        InstructGPTError: if the column is missing, or naming every row that holds something else than text.
    """
    _require(rows, field, where)
    problems, kept, texts = Problems(f"{where}: wrong rows"), list[int](), list[str]()
    table = rows.select_columns([field]) if isinstance(rows, Dataset) else None
    for index, (place, row) in enumerate(numbered(rows if table is None else table)):
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            kept.append(index)
            if table is None:
                texts.append(value)
        elif value is not None and not isinstance(value, str):
            problems.add(f"{place}: {field}: found {short(value)}, expected text")
    problems.raise_if_any()
    if not kept and not is_part(rows):
        raise InstructGPTError(f"{where}: no row holds text in its column {field!r}.")
    if table is None:
        return Dataset.from_dict({"text": texts})
    documents = table if field == "text" else table.rename_column(field, "text")
    return documents if len(kept) == len(documents) else documents.select(kept)


def _require(rows: Rows, field: str, where: str) -> None:
    columns = first_columns(rows, where)
    if field not in columns:
        raise InstructGPTError(missing_columns(columns, [field], where))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before every text: the beginning-of-text token, or none."""
    start = framing_ids(tokenizer)[0][:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def document_ids(text: str, tokenizer: PreTrainedTokenizerBase, leading: list[int]) -> list[int]:
    """Ids of a document between the tokenizer's beginning-of-text token, if it puts one, and EOS."""
    return [*leading, *encode_text(text, tokenizer), tokenizer.eos_token_id]


class PretrainingStream(Iterator[list[int]]):
    """Documents joined by EOS and cut into blocks of equal length.

    The stream is a function of its seed. Processes take its blocks in turn, so together they read what one process
    would read, and a resumed run continues with the next token, whatever the number of processes was before.

    Args:
        dataset: column `text`; shuffled anew in every pass.
        tokenizer: its EOS token ends every document; its beginning-of-text token, if it puts one before every text,
            starts it.
        block_length: tokens in a block.
        seed: seed of the order of the documents.
        process_index: rank of this process, which gets blocks `process_index`, `process_index + num_processes`, ...
        num_processes: number of processes that share the stream.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        documents = StreamedDocuments if isinstance(dataset, IterableDataset) else ShuffledDocuments
        self.documents = documents(dataset, seed)
        self.tokenizer, self.leading, self.block_length = tokenizer, leading_ids(tokenizer), block_length
        self.process_index, self.num_processes = process_index, num_processes
        self.cursor = 0  # index of the next token in the current document
        self._document: list[int] = []

    def _encode(self, text: str) -> list[int]:
        return document_ids(text, self.tokenizer, self.leading)

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
        # The start of a block depends on the lengths of all documents before it, so every process reads them all.
        return [self._block() for _ in range(self.num_processes)][self.process_index]

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, as plain JSON; the same on every process."""
        return {"documents": self.documents.state_dict(), "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position."""
        text = self.documents.load_state_dict(state["documents"])
        self._document, self.cursor = self._encode(text) if text is not None else [], state["cursor"]
