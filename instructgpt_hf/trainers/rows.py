"""Datasets as people have them, to the token ids that a trainer reads; tokenized ones stay as they are."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from instructgpt_hf.data.demonstrations import demonstration_rows, tokenize_demonstrations
from instructgpt_hf.data.prompt_rows import prompt_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import DROPPED, encode_ranking, ranking_rows, tokenize_rankings
from instructgpt_hf.errors import InstructGPTError, Problems
from instructgpt_hf.models.loading import positions

logger = logging.getLogger(__name__)

Rows: TypeAlias = Dataset | IterableDataset
DEMONSTRATION_COLUMNS = ("input_ids",)
RANKING_COLUMNS = ("prompt_ids", "completion_ids", "ranks")


def each(datasets: Any, where: str, prepare: Callable[[Rows, str], Rows]) -> Any:
    """`prepare` for a dataset, or for every one of a dict by name; None and names of datasets stay as they are.

    Raises:
        InstructGPTError: if it is something else.
    """
    if datasets is None or isinstance(datasets, str):
        return datasets
    if isinstance(datasets, Mapping):
        return {
            name: prepare(_dataset(item, f"{where}[{name!r}]"), f"{where}[{name!r}]")
            for name, item in datasets.items()
        }
    return prepare(_dataset(datasets, where), where)


def training_rows(dataset: Any, prepare: Callable[[Rows, str], Rows]) -> Rows:
    """The dataset to train on, prepared.

    Raises:
        InstructGPTError: if there is none, or it is a dict of several.
    """
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset))
        raise InstructGPTError(
            f"train_dataset: holds the datasets {names}; pass one of them, dataset[{next(iter(dataset), '')!r}]."
        )
    if dataset is None:
        raise InstructGPTError("train_dataset: is required.")
    return prepare(_dataset(dataset, "train_dataset"), "train_dataset")


def _dataset(dataset: Any, where: str) -> Rows:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise InstructGPTError(
            f"{where}: is a {type(dataset).__name__}, not a datasets.Dataset; Dataset.from_list(rows) makes one of a "
            "list of rows."
        )
    if isinstance(dataset, Dataset) and not len(dataset):
        raise InstructGPTError(f"{where}: has no rows.")
    return dataset


@dataclass(frozen=True)
class RowReader:
    """Tokenizes rows with one prompt format, within the lengths that model and settings allow."""

    prompt_format: PromptFormat
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @classmethod
    def of(
        cls,
        prompt_format: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        limit: int | None,
    ) -> RowReader:
        """A reader with the length limit of the settings, or the model's number of positions where that is smaller."""
        known = [item for item in (limit, positions(config)) if item is not None]
        return cls(prompt_format, tokenizer, min(known, default=sys.maxsize))

    def demonstrations(self, dataset: Rows, where: str) -> Rows:
        """`input_ids` and `labels` of demonstrations, in any form that `data.demonstrations` reads."""
        if _holds(dataset, DEMONSTRATION_COLUMNS):
            return dataset
        if isinstance(dataset, IterableDataset):
            raise InstructGPTError(
                f"{where}: demonstrations cannot be streamed; load them with streaming=False, or tokenize them to "
                "input_ids and labels."
            )
        rows, dropped, _ = tokenize_demonstrations(
            demonstration_rows(dataset, where), self.prompt_format, self.tokenizer, self.max_length, where
        )
        self._report(where, {"demonstrations over max_length": dropped["dropped_too_long"]})
        return rows

    def rankings(self, dataset: Rows, where: str) -> Rows:
        """`prompt_ids`, `completion_ids` and `ranks` of rankings, in any form that `data.rankings` reads."""
        if _holds(dataset, RANKING_COLUMNS):
            return dataset
        rows, dropped, _ = tokenize_rankings(
            ranking_rows(dataset, where), self.prompt_format, self.tokenizer, self.max_length, where
        )
        self._report(where, {DROPPED[name]: count for name, count in dropped.items() if name in DROPPED})
        return rows

    def whole_rankings(self, dataset: Rows, where: str) -> Rows:
        """As `rankings`, but every completion of every row is kept, ties and duplicates too.

        Raises:
            InstructGPTError: naming the rows with a completion over the limit, without text or without a rank.
        """
        if _holds(dataset, RANKING_COLUMNS):
            return dataset
        canonical = ranking_rows(dataset, where)
        if isinstance(canonical, IterableDataset):
            raise InstructGPTError(f"{where}: is a stream; load it with streaming=False to score it.")
        problems = Problems(f"{where}: every completion is scored here, so none can be left out:")
        for row in canonical:
            if row["unranked"] or len(row["completions"]) < 2:
                problems.add(f"{row['row']}: needs text and rank for each of its completions")
        problems.raise_if_any()
        encoded = canonical.map(
            lambda row: encode_ranking(row, self.prompt_format, self.tokenizer), remove_columns=canonical.column_names
        )
        for place, row in zip(canonical["row"], encoded, strict=True):
            longest = len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))
            if longest > self.max_length:
                problems.add(
                    f"{place}: {longest} tokens, and max_length or the model's positions are {self.max_length}"
                )
        problems.raise_if_any()
        return encoded

    def prompts(self, dataset: Rows, where: str) -> Rows:
        """The rows whose prompt is within the limit, with all of their columns."""
        if isinstance(dataset, IterableDataset):
            raise InstructGPTError(f"{where}: prompts cannot be streamed; load them with streaming=False.")
        rows, counts = prompt_rows(dataset, self.prompt_format, self.tokenizer, self.max_length, where)
        self._report(
            where,
            {
                "rows without a prompt": counts["dropped_empty"],
                "prompts over max_prompt_length": counts["dropped_too_long"],
            },
        )
        return rows

    def _report(self, where: str, left_out: dict[str, int]) -> None:
        counted = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        if counted:
            logger.warning("%s: left out %s.", where, counted)


def _holds(dataset: Rows, columns: tuple[str, ...]) -> bool:
    # The columns of a stream may be unknown until it is read.
    return set(columns) <= set(dataset.column_names or next(iter(dataset), ()))
