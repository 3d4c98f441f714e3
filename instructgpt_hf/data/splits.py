"""The one place that holds data back: which rows a stage trains on and which it is measured on.

The rows held back are the test split that the settings name, or the lab's own. Without one they are a part of the
training split: a tenth of the demonstrations or prompts, a tenth of the ranked prompts with all their rankings, or a
twentieth of the pretraining documents, at most 200 each; of a stream the first 200 rows. The choice depends on the
data alone, so every stage and the evaluation make the same one, and no stage trains on what another one measures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset

from instructgpt_hf.config.data import DataArguments, PPOArguments, RewardArguments, SFTArguments
from instructgpt_hf.data.pretraining import pretraining_rows, with_text
from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.data.rows import is_text, require_columns
from instructgpt_hf.data.sources import Sources
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import LAB_PREFIX

HELD_BACK_LIMIT = 200
SHARE, TEXT_SHARE = 10, 20  # one row in so many is held back


class Split(NamedTuple):
    """Rows to train on, and rows held back for measuring."""

    train: Dataset | IterableDataset
    test: Dataset


def test_split(data_args: DataArguments) -> str | None:
    """Name of the split to measure on, or None if a part of the train split must be held back.

    A single local file has no splits, so a part of it is held back whatever the setting says.
    """
    name = str(data_args.dataset_name)
    split = data_args.dataset_test_split or ("test" if name.startswith(LAB_PREFIX) else None)
    return None if Path(name).expanduser().is_file() else split


def read_split(sources: Sources, data_args: DataArguments, role: str) -> Split:
    """Demonstrations or prompts; raises InstructGPTError if they cannot be read or are too few to hold one back."""
    name, config = str(data_args.dataset_name), data_args.dataset_config
    rows = sources.read(name, config, data_args.dataset_train_split, role)
    if (split := test_split(data_args)) is not None:
        return Split(rows, sources.read(name, config, split, f"{role}_test"))
    parts = _hold_back_rows(rows, SHARE, f"{role}: {name} has 1 row")
    sources.records[role]["held_back"] = len(parts.test)
    return parts


def read_rankings(sources: Sources, data_args: RewardArguments) -> Split:
    """Rankings in canonical form (`data.rankings.rows.ranking_rows`); the schema goes into the record of the source.

    Raises:
        InstructGPTError: if the schema is not known, rows are wrong, or there are too few to hold one back.
    """
    name, config, streaming = str(data_args.dataset_name), data_args.dataset_config, data_args.streaming
    where = f"rankings: {name}"
    source = sources.read(name, config, data_args.dataset_train_split, "rankings", streaming)
    schema, first = recognise(source, where)
    rows = ranking_rows(source, where, (schema, first))
    if (split := test_split(data_args)) is not None:
        held_back = sources.read(name, config, split, "rankings_test")
        parts = Split(rows, ranking_rows(held_back, f"{where} (held back)"))
    else:
        parts = _hold_back_first(rows, where, "streaming") if streaming else _hold_back_prompts(rows, where)
        sources.records["rankings"]["held_back"] = len(parts.test)
    sources.records["rankings"]["schema"] = schema.name
    return parts


def read_pretraining(
    sources: Sources, data_args: SFTArguments | PPOArguments, setting: str, weight: float
) -> Split | None:
    """Pretraining text to train on and some held back, in the column `text`; None if `weight` is 0.

    Args:
        setting: name of the setting whose value `weight` is, for messages.
        weight: of the pretraining text in the stage's objective.

    Raises:
        InstructGPTError: if `weight` is set but no dataset is, or the data cannot be used.
    """
    name, config = data_args.pretraining_dataset_name, data_args.pretraining_dataset_config
    if not weight:
        return None
    if name is None:
        raise InstructGPTError(
            f"{setting} = {weight}: needs pretraining_dataset_name, the text to mix in; {setting}: 0 does without."
        )
    where = f"pretraining: {name}"
    split, streaming = data_args.pretraining_dataset_split, data_args.pretraining_streaming
    text = sources.read(name, config, split, "pretraining", streaming)
    text = with_text(text, data_args.pretraining_dataset_text_field, where)
    if not isinstance(text, IterableDataset):
        text = pretraining_rows(text, where)
    if name.startswith(LAB_PREFIX):
        held_back = sources.read(name, config, "test", "pretraining_test")
        return Split(text, pretraining_rows(held_back, "pretraining test"))
    if isinstance(text, IterableDataset):
        parts = _hold_back_first(text, where, "pretraining_streaming")
        require_columns(parts.test, ["text"], where)
        texts = list(filter(is_text, parts.test["text"]))
        if not texts:
            raise InstructGPTError(
                f"{where}: none of the first {HELD_BACK_LIMIT} rows holds text, which are held back."
            )
        return Split(parts.train, Dataset.from_dict({"text": texts}))
    return _hold_back_rows(text, TEXT_SHARE, f"{where} has 1 document")


def _hold_back_rows(rows: Dataset, share: int, one_row: str) -> Split:
    """Hold back one row in `share`; `one_row` begins the error where there is only one."""
    if len(rows) < 2:
        raise InstructGPTError(f"{one_row}; at least 2 are needed to hold one back for measuring.")
    count = min(HELD_BACK_LIMIT, max(1, len(rows) // share))
    parts = rows.train_test_split(test_size=count, seed=0)
    return Split(parts["train"], parts["test"])


def _hold_back_prompts(rows: Dataset, where: str) -> Split:
    """Rankings of one prompt, by several labelers, stay together: a model is measured on prompts it has not seen."""
    keys = [json.dumps(prompt) for prompt in rows["prompt"]]
    count = "1 row" if len(rows) < 2 else f"{len(rows)} rows of one prompt"
    prompts = Dataset.from_dict({"key": list(dict.fromkeys(keys))})
    chosen = set(_hold_back_rows(prompts, SHARE, f"{where} has {count}").test["key"])
    train = rows.select([index for index, key in enumerate(keys) if key not in chosen])
    return Split(train, rows.select([index for index, key in enumerate(keys) if key in chosen]))


def _hold_back_first(rows: IterableDataset, where: str, setting: str) -> Split:
    """Hold back the first rows of a stream; `setting` is what turns streaming off."""
    first, rest = list(rows.take(HELD_BACK_LIMIT)), rows.skip(HELD_BACK_LIMIT)
    if next(iter(rest), None) is None:
        raise InstructGPTError(
            f"{where} has {len(first)} row{'s' * (len(first) > 1)}; a stream needs more, because its first "
            f"{HELD_BACK_LIMIT} are held back for measuring. Set {setting}: false."
        )
    return Split(rest, Dataset.from_list(first, features=rows.features))
