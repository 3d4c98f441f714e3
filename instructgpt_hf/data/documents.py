"""The documents of a text dataset, one after another for ever, from a position that can be saved."""

from __future__ import annotations

import itertools
import random
from typing import Any, Protocol

import torch
from datasets import Dataset, IterableDataset

from instructgpt_hf.data.rows import is_text
from instructgpt_hf.errors import InstructGPTError

WINDOW = 1_000  # documents of a stream that are in memory at a time, and shuffled among themselves


class Documents(Protocol):
    """Endless documents. `state_dict` stands for the document that `advance` returned last."""

    def advance(self) -> str:
        """The next document."""

    def state_dict(self) -> dict[str, Any]:
        """Where the documents stand, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go to where `state_dict` was taken; returns the document there, or None at the very start."""


def documents_of(dataset: Dataset | IterableDataset, seed: int) -> Documents:
    """The documents of a dataset with the column `text`, in an order that is a function of the seed."""
    if isinstance(dataset, IterableDataset):
        return StreamedDocuments(dataset, seed)
    return ShuffledDocuments(dataset, seed)


class ShuffledDocuments:
    """Every document once per pass, each pass in a fresh random order.

    Args:
        dataset: column `text`.
        seed: of the orders.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.passes = 0
        self.position = -1  # in the order of this pass
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return order

    def _present(self) -> str:
        return str(self.dataset[self._order[self.position]]["text"])

    def advance(self) -> str:
        """The next document."""
        self.position += 1
        if self.position == len(self._order):
            self.passes, self.position = self.passes + 1, 0
            self._order = self._shuffled()
        return self._present()

    def state_dict(self) -> dict[str, Any]:
        """Number of the pass, and position in its order."""
        return {"passes": self.passes, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Continue behind the document that `state` stands for."""
        self.passes, self.position = state["passes"], state["position"]
        self._order = self._shuffled()
        return self._present() if self.position >= 0 else None


class StreamedDocuments:
    """A stream in its own order, from the start again at its end; each window of documents is shuffled.

    A window is read whole and its order is a function of seed, pass and window, so the stream's position at the
    window's start and a number are an exact position. (The shuffle buffer of `datasets` is refilled on resuming.)
    Rows without text are left out.

    Args:
        dataset: column `text`.
        seed: of the orders.
        window: rows of a window.

    Raises:
        InstructGPTError: when it is read, if no row has text.
    """

    def __init__(self, dataset: IterableDataset, seed: int, window: int = WINDOW) -> None:
        self.dataset = dataset
        self.seed = seed
        self.window = window
        self._found = False
        self._open(passes=0, number=-1, start=None)

    def _open(self, passes: int, number: int, start: dict[str, Any] | None) -> None:
        """Go to the start of the window behind window `number` of a pass."""
        self.passes, self.number, self.position = passes, number, -1
        self._documents: list[str] = []
        self._start: dict[str, Any] | None = None
        self._next: dict[str, Any] | None = start
        # A stream that was given a position starts there whenever it is read, so each pass reads one of its own.
        self._stream = self.dataset.select_columns(["text"])
        if start is not None:
            self._stream.load_state_dict(start)
        self._rows = iter(self._stream)

    def _read_window(self) -> bool:
        """Read and shuffle the next window; False at the end of the stream."""
        rows = list(itertools.islice(self._rows, self.window))
        self.number, self.position = self.number + 1, -1
        self._start, self._next = self._next, self._stream.state_dict()
        self._documents = [row["text"] for row in rows if isinstance(row["text"], str) and is_text(row["text"])]
        random.Random(f"{self.seed} {self.passes} {self.number}").shuffle(self._documents)
        return bool(rows)

    def advance(self) -> str:
        """The next document."""
        while self.position + 1 == len(self._documents):
            if not self._read_window():
                if not self._found:
                    raise InstructGPTError("the stream of pretraining text holds no row with text.")
                self._open(passes=self.passes + 1, number=-1, start=None)
        self._found = True
        self.position += 1
        return self._documents[self.position]

    def state_dict(self) -> dict[str, Any]:
        """Number of the pass and of the window, the stream's own state before it, position in its order."""
        return {"passes": self.passes, "window": self.number, "position": self.position, "stream": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Continue behind the document that `state` stands for."""
        if state["position"] < 0:
            self._open(passes=0, number=-1, start=None)
            return None
        self._open(passes=state["passes"], number=state["window"] - 1, start=state["stream"])
        self._found = self._read_window()
        self.position = state["position"]
        return self._documents[self.position]
