"""The one place that holds data back: which rows a stage trains on and which it is measured on.

The rows held back are the test split that the settings name, that of a dataset folder, or the lab's own. Without one
they are a part of the training split's usable rows: a tenth of the prompts with all their demonstrations or rankings,
or a twentieth of the pretraining documents, at most 200 each; of a stream the first 200 rows. Of such a part, equal
prompts are never on both sides; a test split is taken as it is. The choice depends on the prompts alone, so every
stage and the evaluation make the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.config.data import DataArguments, PPOArguments, RewardArguments, SFTArguments
from instructgpt_hf.data.demonstrations import read_demonstrations
from instructgpt_hf.data.messages import Prompt
from instructgpt_hf.data.pretraining import pretraining_rows, with_text
from instructgpt_hf.data.prompt_rows import prompt_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.data.sources import Sources, hub_layout, local_files, split_file
from instructgpt_hf.data.values import is_text
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import LAB_PREFIX

HELD_BACK_LIMIT = 200
SHARE, TEXT_SHARE = 10, 20  # one prompt or document in so many is held back


class Split(NamedTuple):
    """Rows to train on, and rows held back for measuring."""

    train: Dataset | IterableDataset
    test: Dataset


class Source(NamedTuple):
    """Rows of the training split, and of the test split; None if a part of the former must be held back."""

    train: Dataset | IterableDataset
    test: Dataset | None


def test_split(data_args: DataArguments, role: str = "dataset") -> str | None:
    """Name of the split to measure on, or None if a part of the train split must be held back.

    A file has no splits, so a part of it is held back whatever the setting says. Of a folder, the split `test` is
    used where it has one.

    Raises:
        InstructGPTError: if a local dataset is not there; `role` begins the message.
    """
    name, named = str(data_args.dataset_name), data_args.dataset_test_split
    if name.startswith(LAB_PREFIX):
        return named or "test"
    folder = Path(name).expanduser()
    if folder.is_dir():
        has_test = split_file(folder, "test", role) is not None
        has_test = has_test or "test" in hub_layout(folder, data_args.dataset_config)
        return named or ("test" if has_test else None)
    return None if local_files(name, data_args.dataset_train_split, role) is not None else named


def read_demonstration_source(sources: Sources, data_args: SFTArguments) -> Source:
    """Demonstrations in canonical form (`data.demonstrations.demonstration_rows`).

    Raises:
        InstructGPTError: if they cannot be read or rows are wrong.
    """
    name, config = str(data_args.dataset_name), data_args.dataset_config
    where = f"demonstrations: {name}"
    source = sources.read(name, config, data_args.dataset_train_split, "demonstrations")
    train, empty = read_demonstrations(source, where)
    sources.records["demonstrations"]["dropped_empty"] = empty
    if (split := test_split(data_args)) is None:
        return Source(train, None)
    held_back = sources.read(name, config, split, "demonstrations_test")
    return Source(train, read_demonstrations(held_back, f"{where} (held back)")[0])


def read_prompts(
    sources: Sources,
    data_args: PPOArguments,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    with_columns: bool = False,
) -> tuple[Split, dict[str, int]]:
    """Prompts within the length limit, maybe with the source's other columns; and the counts of `prompt_rows`.

    Raises:
        InstructGPTError: if they cannot be read, rows are wrong, or there are too few to hold one back.
    """
    name, config = str(data_args.dataset_name), data_args.dataset_config
    where = f"prompts: {name}"
    source = sources.read(name, config, data_args.dataset_train_split, "prompts")
    train, counts = prompt_rows(source, prompt_format, tokenizer, max_prompt_length, where, with_columns)
    if (split := test_split(data_args)) is not None:
        source = sources.read(name, config, split, "prompts_test")
        where = f"{where} (held back)"
        test, _ = prompt_rows(source, prompt_format, tokenizer, max_prompt_length, where, with_columns)
        return Split(train, test), counts
    parts = hold_back(train, prompt_keys(train["prompt"]), where)
    sources.records["prompts"]["held_back"] = len(parts.test)
    return parts, counts


def read_rankings(sources: Sources, data_args: RewardArguments) -> Source:
    """Rankings in canonical form (`data.rankings.rows.ranking_rows`); the schema goes into the record of the source.

    Raises:
        InstructGPTError: if the schema is not known, rows are wrong, or a stream is too short to hold rows back.
    """
    name, config, streaming = str(data_args.dataset_name), data_args.dataset_config, data_args.streaming
    where = f"rankings: {name}"
    source = sources.read(name, config, data_args.dataset_train_split, "rankings", streaming)
    recognised = recognise(source, where)
    rows, test = ranking_rows(source, where, recognised), None
    if (split := test_split(data_args)) is not None:
        held_back = sources.read(name, config, split, "rankings_test")
        test = ranking_rows(held_back, f"{where} (held back)")
    elif isinstance(rows, IterableDataset):
        rows, test = _hold_back_first(rows, "prompt", where, "streaming")
        sources.records["rankings"]["held_back"] = len(test)
    sources.records["rankings"]["schema"] = recognised[0].name
    return Source(rows, test)


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
    where, field = f"pretraining: {name}", data_args.pretraining_dataset_text_field
    split, streaming = data_args.pretraining_dataset_split, data_args.pretraining_streaming
    source = sources.read(name, config, split, "pretraining", streaming)
    text: Dataset | IterableDataset
    if isinstance(source, IterableDataset):
        text = with_text(source, field, where)
    else:
        text = pretraining_rows(source, where, field)
        sources.records["pretraining"]["dropped_empty"] = len(source) - len(text)
    if name.startswith(LAB_PREFIX):
        held_back = sources.read(name, config, "test", "pretraining_test")
        return Split(text, pretraining_rows(held_back, "pretraining test"))
    if isinstance(text, IterableDataset):
        rest, first = _hold_back_first(text, "text", where, "pretraining_streaming")
        texts = list(filter(is_text, first["text"]))
        if not texts:
            raise InstructGPTError(
                f"{where}: none of the first {HELD_BACK_LIMIT} rows holds text, which are held back."
            )
        return Split(rest, Dataset.from_dict({"text": texts}))
    return hold_back(text, text["text"], where, TEXT_SHARE, "document", "of one text")


def prompt_keys(prompts: Iterable[Prompt | None]) -> list[str]:
    """What tells prompts apart: of a conversation, the turns before the first answer, so its parts stay together."""
    return [json.dumps(_opening(prompt)) for prompt in prompts]


def demonstration_keys(rows: Dataset) -> list[str]:
    """What tells demonstrations apart: their prompts, or the text of those without one."""
    prompts = zip(rows["prompt"], rows["completion"], strict=True)
    return prompt_keys(text if prompt is None else prompt for prompt, text in prompts)


def _opening(prompt: Any) -> Any:
    if not isinstance(prompt, list):
        return prompt
    answers = (number for number, turn in enumerate(prompt) if turn["role"] == "assistant")
    return prompt[: next(answers, len(prompt))]


def hold_back(
    rows: Dataset, keys: Iterable[Any], where: str, share: int = SHARE, unit: str = "row", same: str = "of one prompt"
) -> Split:
    """Hold back one key in `share`, at most `HELD_BACK_LIMIT`, with all rows that have it.

    Keys are taken in the order of their hashes, so the choice is the same in every stage that reads the same prompts.

    Args:
        keys: one for every row; rows of equal keys stay together.
        where: name of the dataset in the error.
        unit, same: what a row is called there, and what rows of equal keys have in common.

    Raises:
        InstructGPTError: if there are not two different keys.
    """
    hashes = [hashlib.sha256(str(key).encode("utf-8", "surrogatepass")).digest() for key in keys]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        count = f"1 {unit}" if len(rows) < 2 else f"{len(rows)} {unit}s {same}"
        raise InstructGPTError(f"{where} has {count}; at least 2 are needed to hold one back for measuring.")
    chosen = set(distinct[: min(HELD_BACK_LIMIT, max(1, len(distinct) // share))])
    train = rows.select([index for index, item in enumerate(hashes) if item not in chosen])
    return Split(train, rows.select([index for index, item in enumerate(hashes) if item in chosen]))


def _hold_back_first(rows: IterableDataset, column: str, where: str, setting: str) -> Split:
    """Hold back the first rows of a stream, and leave out later ones with an equal value in `column`.

    `setting` is what turns streaming off.
    """
    first, rest = list(rows.take(HELD_BACK_LIMIT)), rows.skip(HELD_BACK_LIMIT)
    if next(iter(rest), None) is None:
        raise InstructGPTError(
            f"{where} has {len(first)} row{'s' * (len(first) > 1)}; a stream needs more, because its first "
            f"{HELD_BACK_LIMIT} are held back for measuring. Set {setting}: false."
        )
    rest = rest.filter(_Unseen({json.dumps(row.get(column)) for row in first}), input_columns=[column])
    if next(iter(rest), None) is None:
        raise InstructGPTError(
            f"{where}: every {column} is among those of its first {HELD_BACK_LIMIT} rows, which are held back for "
            f"measuring, so none is left to train on. Set {setting}: false."
        )
    return Split(rest, Dataset.from_list(first, features=rows.features))


class _Unseen:
    """Whether a value was not seen; a class, because the workers of a data loader pickle it."""

    def __init__(self, seen: set[str]) -> None:
        self.seen = seen

    def __call__(self, value: Any) -> bool:
        return json.dumps(value) not in self.seen
