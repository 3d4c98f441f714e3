"""`instructgpt-hf data inspect`: summarize a dataset of rankings as the reward trainer will see it."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

from datasets.utils import disable_progress_bars

from instructgpt_hf import lab
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact
from instructgpt_hf.config.settings import stage_settings
from instructgpt_hf.data.files import Rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import encode_ranking, ranking_rows
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.data.rankings.summary import Encode, summarize_rankings, words_of
from instructgpt_hf.data.sources import Sources, load_split, local_files
from instructgpt_hf.lab import LAB_MODEL
from instructgpt_hf.models.loading import load_tokenizer


def inspect_rankings(
    name: str,
    config: str | None = None,
    split: str = "train",
    tokenizer: str | None = None,
    prompt_template: str | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Summarize a dataset of rankings as the reward stage reads it.

    Args:
        name, config, split: as `dataset_name`, `dataset_config`, `dataset_train_split`; `lab:rankings` works, too.
        tokenizer: Hub id, folder or `lab`. Without one, lengths are in words and no limit applies.
        prompt_template: name of the prompt format; by default that of the finished stage in the folder `tokenizer`, or
            `chat`.
        max_length, max_prompt_length: limits in tokens; by default those of the reward stage.
        limit: number of rows of the source to read; all by default.

    Returns:
        The summary of `data.rankings.summary.summarize_rankings`, with `dataset`, `split`, `schema`, `unit` and
        `limits`.

    Raises:
        InstructGPTError: if the data cannot be read, have no known schema or wrong rows, as in training; or if the
            tokenizer cannot be used.
    """
    where = f"rankings: {name}"
    disable_progress_bars()
    source = _read(name, config, split, limit)
    schema, first = recognise(source, where)
    rows = ranking_rows(source, where, (schema, first))
    encode: Encode = words_of
    limits, unit = dict[str, Any](), "words"
    if tokenizer is not None:
        encode, unit = _encoder(tokenizer, prompt_template), "tokens"
        given = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        defaults = stage_settings("reward")
        limits = {key: defaults[key].default if value is None else value for key, value in given.items()}
    summary = summarize_rankings(rows, encode, **limits)
    return {"dataset": name, "split": split, "schema": schema.name, "unit": unit, "limits": limits, **summary}


def _read(name: str, config: str | None, split: str, limit: int | None) -> Rows:
    with tempfile.TemporaryDirectory() as folder:

        def lab_folder() -> Path:
            lab.write(Path(folder))
            return Path(folder)

        source = Sources(lab_folder).resolve(name, split, "rankings")
        from_hub = local_files(source, split, "rankings", config) is None
        rows = load_split(source, split, config, "rankings", streaming=from_hub and limit is not None)
        if limit is None and source == name:
            return rows
        # The lab's rows are read into memory, because their file is gone afterwards.
        return list(itertools.islice(rows, limit))


def _encoder(source: str, template: str | None) -> Encode:
    """Encoder of a row, as the reward stage tokenizes it."""
    folder = lab.base_model_path() if source == LAB_MODEL else Path(source).expanduser()
    tokenizer = load_tokenizer(folder)
    if template is None and (folder / STAGE_FILE).is_file():
        prompt_format = PromptFormat.from_dict(StageArtifact.load(folder).prompt_format)
    else:
        prompt_format = PromptFormat.create(template or stage_settings("sft")["prompt_template"].default, tokenizer)
    return functools.partial(encode_ranking, prompt_format=prompt_format, tokenizer=tokenizer)
