"""Endless, resumable iteration over the documents of a text dataset, in an order that is a function of a seed.

`state_dict()` is the position of the last document that `advance()` returned, as plain JSON.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from instructgpt_hf.data.values import is_text
from instructgpt_hf.errors import InstructGPTError

WINDOW = 1_000  # rows of a stream that are held in memory and shuffled together


class ShuffledDocuments:
    """Documents of a `Dataset` with the column `text`: each once per pass, every pass in a new random order."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.passes = 0
        self.position = -1  # index in the order of this pass
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def _current(self) -> str:
        return str(self.dataset[self._order[self.position]]["text"])

    def advance(self) -> str:
        """Return the next document."""
        self.position += 1
        if self.position == len(self._order):
            self.passes, self.position = self.passes + 1, 0
            self._order = self._shuffled()
        return self._current()

    def state_dict(self) -> dict[str, Any]:
        """Number of the pass and index in its order."""
        return {"passes": self.passes, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Restore a position and return its document, or None if no document had been returned yet."""
        self.passes, self.position = state["passes"], state["position"]
        self._order = self._shuffled()
        return self._current() if self.position >= 0 else None


class StreamedDocuments:
    """Documents of an `IterableDataset`: windows in the stream's order, the documents of each window shuffled.

    A window is read whole and its order is a function of seed, pass and window. So the stream's state at the start of
    a window and an index identify a document exactly, which the shuffle buffer of `datasets` cannot do: it is refilled
    on resuming. The stream starts again at its end. Rows without text are skipped.

    Args:
        dataset: column `text`.
        seed: seed of the orders.
        window: number of rows in a window.

    Raises:
        InstructGPTError: from `advance`, if no row has text.
    """

    def __init__(self, dataset: IterableDataset, seed: int, window: int = WINDOW) -> None:
        self.dataset, self.seed, self.window = dataset, seed, window
        self._has_text = False  # whether any row so far had text
        self._open(passes=0, number=-1, start=None)

    def _open(self, passes: int, number: int, start: dict[str, Any] | None) -> None:
        """Go to the start of window `number` + 1 of a pass; `start` is the stream's state there."""
        self.passes, self.number, self.position = passes, number, -1
        self._documents: list[str] = []
        self._start: dict[str, Any] | None = None
        self._next: dict[str, Any] | None = start
        # A stream whose state was loaded starts there in every iteration, so each pass opens the dataset anew.
        self._stream = self.dataset.select_columns(["text"])
        if start is not None:
            self._stream.load_state_dict(start)
        self._rows = iter(self._stream)

    def _read_window(self) -> bool:
        """Read and shuffle the next window; False at the end of the stream."""
        rows = list(itertools.islice(self._rows, self.window))
        self.number, self.position = self.number + 1, -1
        self._start, self._next = self._next, self._stream.state_dict()
        self._documents = [row["text"] for row in rows if is_text(row["text"])]
        random.Random(f"{self.seed} {self.passes} {self.number}").shuffle(self._documents)
        return bool(rows)

    def advance(self) -> str:
        """Return the next document."""
        while self.position + 1 == len(self._documents):
            if not self._read_window():
                if not self._has_text:
                    raise InstructGPTError("the stream of pretraining text holds no row with text.")
                self._open(passes=self.passes + 1, number=-1, start=None)
        self._has_text = True
        self.position += 1
        return self._documents[self.position]

    def state_dict(self) -> dict[str, Any]:
        """Numbers of the pass and the window, the stream's state before the window, and the index in its order."""
        return {"passes": self.passes, "window": self.number, "position": self.position, "stream": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Restore a position and return its document, or None if no document had been returned yet."""
        if state["position"] < 0:
            self._open(passes=0, number=-1, start=None)
            return None
        self._open(passes=state["passes"], number=state["window"] - 1, start=state["stream"])
        self._has_text = self._read_window()
        self.position = state["position"]
        return self._documents[self.position]
