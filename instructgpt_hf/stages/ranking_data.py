"""Where the reward stage's rankings come from, and which of them are held back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from instructgpt_hf.data.rankings.rows import Rows, ranking_rows
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.errors import InstructGPTError

if TYPE_CHECKING:
    from instructgpt_hf.stages.run import StageRun

HELD_BACK_LIMIT = 200


def read_rankings(run: StageRun, role: str) -> tuple[Rows, Dataset]:
    """The rankings to train on and those held back, both in their one form; the schema goes into `run.data`.

    Held back is the test split; without one, a tenth of the prompts, at most 200, with all their rankings; of a stream
    the first 200 rows.

    Raises:
        InstructGPTError: if the schema is not known, rows are wrong, or there are too few to hold one back.
    """
    arguments = run.settings.data_args
    name, config, streaming = arguments.dataset_name, arguments.dataset_config, arguments.streaming
    where = f"{role}: {name}"
    source = run.dataset(name, config, arguments.dataset_train_split, role, streaming)
    schema, _ = recognise(source, where)
    rows = ranking_rows(source, where)
    test_split = run.test_split()
    if test_split is not None:
        train, test = rows, ranking_rows(run.dataset(name, config, test_split, f"{role}_test"), f"{where} (held back)")
    else:
        train, test = _first_rows(rows, where) if isinstance(rows, IterableDataset) else _some_prompts(rows, where)
        run.data[role]["held_back"] = len(test)
    run.data[role]["schema"] = schema.name
    run.log(f"read as {schema.name}; {len(test)} rankings held back")
    return train, test


def _some_prompts(rows: Dataset, where: str) -> tuple[Dataset, Dataset]:
    """Rows of one prompt, by several labelers, stay together: a model is measured on prompts it has not seen."""
    keys = [json.dumps(prompt) for prompt in rows["prompt"]]
    prompts = list(dict.fromkeys(keys))
    if len(prompts) < 2:
        found = "1 row" if len(rows) < 2 else f"{len(rows)} rows of one prompt"
        raise InstructGPTError(f"{where} has {found}; at least 2 are needed to hold one back for measuring.")
    size = min(HELD_BACK_LIMIT, max(1, len(prompts) // 10))
    chosen = set(Dataset.from_dict({"key": prompts}).train_test_split(test_size=size, seed=0)["test"]["key"])
    train = rows.select([index for index, key in enumerate(keys) if key not in chosen])
    return train, rows.select([index for index, key in enumerate(keys) if key in chosen])


def _first_rows(rows: IterableDataset, where: str) -> tuple[IterableDataset, Dataset]:
    test = Dataset.from_list(list(rows.take(HELD_BACK_LIMIT)), features=rows.features)
    train = rows.skip(len(test))
    if next(iter(train), None) is None:
        raise InstructGPTError(
            f"{where} has {len(test)} row{'s' * (len(test) > 1)}; a stream needs more, because its first "
            f"{HELD_BACK_LIMIT} are held back for measuring. Set streaming: false."
        )
    return train, test
