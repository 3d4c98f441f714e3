"""Tables that `instructgpt-hf data inspect` prints."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from instructgpt_hf.data.rankings.rows import DROPPED

SHOWN = 100  # characters of a text of an example
LABELERS_SHOWN = 5


def show(summary: dict[str, Any], console: Console) -> None:
    """Print what `stages.inspection.inspect_rankings` returns."""
    console.print(Text(f"{summary['dataset']}, split {summary['split']}, read as {summary['schema']}"))
    console.print(_counts(summary), "", _lengths(summary), sep="\n")
    limits = ", ".join(f"{key} {value}" for key, value in summary["limits"].items())
    in_words = "Lengths are in words and no limit applies; --tokenizer counts tokens."
    console.print(f"Lengths are before the limits: {limits}." if limits else in_words, highlight=False)
    for number, example in enumerate(summary["examples"], start=1):
        console.print("", _example(number, example), sep="\n")


def _counts(summary: dict[str, Any]) -> Table:
    table = _table("", "count")
    dropped = {f"dropped: {what}": summary["dropped"][key] for key, what in DROPPED.items() if summary["dropped"][key]}
    read = {"prompts read": summary["read"]["prompts"], "completions read": summary["read"]["completions"]}
    for name, count in {**read, **dropped}.items():
        table.add_row(name, _number(count))
    table.add_section()
    left = {"prompts to train on": summary["prompts"], "completions to train on": summary["completions"]}
    left |= {f"prompts with {size} completions": prompts for size, prompts in summary["by_size"].items()}
    for name, count in {**left, "pairs": summary["pairs"], "tied pairs": summary["tied_pairs"]}.items():
        table.add_row(name, _number(count))
    if summary["longer_is_better"] is not None:
        table.add_row("pairs whose better completion is the longer one", f"{summary['longer_is_better']:.1%}")
    if labelers := summary["labelers"]:
        table.add_row("labelers", _number(labelers["count"]))
        table.add_row("prompts ranked by several labelers", _number(labelers["shared_prompts"]))
        for labeler, rankings in list(labelers["rankings"].items())[:LABELERS_SHOWN]:
            table.add_row(Text(f"rankings by {labeler}"), _number(rankings))
    return table


def _lengths(summary: dict[str, Any]) -> Table:
    table = _table(f"length in {summary['unit']}", "median", "95 %", "max")
    for what, name in (("prompt", "prompt"), ("completion", "completion"), ("together", "prompt + completion")):
        table.add_row(name, *(_number(value) for value in summary["lengths"][what].values()))
    return table


def _example(number: int, example: dict[str, Any]) -> Table:
    prompt = example["prompt"] or ""
    if isinstance(prompt, list):
        prompt = " | ".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    table = _table(f"example {number}", "text", justify="left")
    table.add_row("prompt", _short(prompt))
    for rank, completion in sorted(zip(example["ranks"], example["completions"], strict=True)):
        table.add_row(f"rank {rank}", _short(completion))
    return table


def _table(first: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    others = [Column(name, justify=justify) for name in columns]
    return Table(first, *others, box=None, pad_edge=False, header_style="bold")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _short(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= SHOWN else line[: SHOWN - 3] + "...")
