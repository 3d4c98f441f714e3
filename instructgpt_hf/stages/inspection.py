"""`instructgpt-hf data inspect`: what the reward trainer will see of a dataset."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from datasets.utils import disable_progress_bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from instructgpt_hf import lab
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact
from instructgpt_hf.config.settings import stage_settings
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import DROPPED, encode_ranking, ranking_rows
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.data.rankings.summary import summarize_rankings, words_of
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.lab import LAB_MODEL, LAB_PREFIX, lab_kind
from instructgpt_hf.models.loading import load_tokenizer

SHOWN = 100  # characters of an example's text
LABELERS_SHOWN = 5


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
    """Read a dataset as the reward stage does, and describe it.

    Args:
        name, config, split: as `dataset_name`, `dataset_config`, `dataset_train_split`; `lab:rankings` works too.
        tokenizer: Hub id or folder, or `lab`; the prompt format of a finished stage's folder is its own. Without one,
            lengths are in words and no limit applies.
        prompt_template: how prompts become tokens; `chat` by default.
        max_length, max_prompt_length: limits in tokens, the reward stage's defaults if not given.
        limit: look at this many rows of the source only.

    Returns:
        The summary of `data.ranking_summary.summarize_rankings`, with `dataset`, `split`, `schema`, `unit` and
        `limits`.

    Raises:
        InstructGPTError: as training would: unreadable data, an unknown schema, wrong rows; or an unusable tokenizer.
    """
    where = f"rankings: {name}"
    disable_progress_bars()
    source = _read(name, config, split, limit)
    schema, _ = recognise(source, where)
    rows = ranking_rows(source, where)
    encode, limits, unit = words_of, dict[str, Any](), "words"
    if tokenizer is not None:
        encode, unit = _encoder(tokenizer, prompt_template), "tokens"
        given = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        defaults = stage_settings("reward")
        limits = {key: defaults[key].default if value is None else value for key, value in given.items()}
    summary = summarize_rankings(rows, encode, **limits)
    return {"dataset": name, "split": split, "schema": schema.name, "unit": unit, "limits": limits, **summary}


def _read(name: str, config: str | None, split: str, limit: int | None) -> Dataset:
    with tempfile.TemporaryDirectory() as folder:
        source = name
        if name.startswith(LAB_PREFIX):
            lab.write(Path(folder), seed=0)
            source = str(Path(folder) / f"{lab_kind(name, 'rankings')}.{split}.jsonl")
        elif limit is None:
            return load_split(source, split, config, "rankings")
        stream = load_split(source, split, config, "rankings", streaming=True)
        rows = list(stream if limit is None else stream.take(limit))
        return Dataset.from_list(rows, features=stream.features)


def _encoder(source: str, template: str | None) -> Any:
    folder = lab.base_model_path() if source == LAB_MODEL else Path(source).expanduser()
    tokenizer = load_tokenizer(folder)
    if template is None and (folder / STAGE_FILE).is_file():
        made = PromptFormat.from_dict(StageArtifact.load(folder).prompt_format)
    else:
        made = PromptFormat.create(template or stage_settings("sft")["prompt_template"].default, tokenizer)
    return functools.partial(encode_ranking, prompt_format=made, tokenizer=tokenizer)


def show(summary: dict[str, Any], console: Console) -> None:
    """Print what `inspect_rankings` returns."""
    read, labelers = summary["read"], summary["labelers"]
    console.print(Text(f"{summary['dataset']}, split {summary['split']}, read as {summary['schema']}"))
    counts = _table("", "count")
    counts.add_row("prompts read", _number(read["prompts"]))
    counts.add_row("completions read", _number(read["completions"]))
    for key, what in DROPPED.items():
        if summary["dropped"][key]:
            counts.add_row(f"dropped: {what}", _number(summary["dropped"][key]))
    counts.add_section()
    counts.add_row("prompts to train on", _number(summary["prompts"]))
    counts.add_row("completions to train on", _number(summary["completions"]))
    for size, prompts in summary["by_size"].items():
        counts.add_row(f"prompts with {size} completions", _number(prompts))
    counts.add_row("pairs", _number(summary["pairs"]))
    counts.add_row("tied pairs", _number(summary["tied_pairs"]))
    if summary["longer_is_better"] is not None:
        counts.add_row("pairs whose better completion is the longer one", f"{summary['longer_is_better']:.1%}")
    if labelers:
        counts.add_row("labelers", _number(labelers["count"]))
        counts.add_row("prompts ranked by several labelers", _number(labelers["shared_prompts"]))
        for labeler, rankings in list(labelers["rankings"].items())[:LABELERS_SHOWN]:
            counts.add_row(Text(f"rankings by {labeler}"), _number(rankings))
    console.print(counts)
    console.print()
    lengths = _table(f"length in {summary['unit']}", "median", "95 %", "max")
    for what, name in (("prompt", "prompt"), ("completion", "completion"), ("together", "prompt + completion")):
        lengths.add_row(name, *(_number(value) for value in summary["lengths"][what].values()))
    console.print(lengths)
    if summary["limits"]:
        text = ", ".join(f"{key} {value}" for key, value in summary["limits"].items())
        console.print(f"Lengths are before the limits: {text}.", highlight=False)
    else:
        console.print("Lengths are in words and no limit applies; --tokenizer counts tokens.", highlight=False)
    for number, example in enumerate(summary["examples"], start=1):
        _show_example(number, example, console)


def _show_example(number: int, example: dict[str, Any], console: Console) -> None:
    prompt = example["prompt"] or ""
    if isinstance(prompt, list):
        prompt = " | ".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    table = _table(f"example {number}", "text", justify="left")
    table.add_row("prompt", _short(prompt))
    for rank, completion in sorted(zip(example["ranks"], example["completions"], strict=True)):
        table.add_row(f"rank {rank}", _short(completion))
    console.print()
    console.print(table)


def _table(first: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify=justify)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _short(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= SHOWN else line[: SHOWN - 3] + "...")
