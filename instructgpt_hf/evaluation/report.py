"""The evaluation report: report.json, report.md, samples.jsonl, a table on the terminal and two pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from instructgpt_hf.artifacts import to_json
from instructgpt_hf.data.prompts import Prompt
from instructgpt_hf.evaluation.intervals import Estimate
from instructgpt_hf.evaluation.plots.policies import draw_policies
from instructgpt_hf.evaluation.plots.training_curves import draw_training_curves
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.metric_register import METRICS, Metric


def write_report(
    folder: str | Path,
    rows: Sequence[PolicyRow],
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write report.json, report.md, policies.png and, with curves, training_curves.png; return the files written.

    Args:
        folder: created if it does not exist.
        rows: one per policy, in the order shown.
        curves: trainer log histories by stage (`sft`, `reward`, `ppo`, `ppo-ptx`); stages may be missing.
        notes: facts about the measurement by name, such as the judge and the number of prompts.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    record = {"notes": dict(notes or {}), "policies": [asdict(row) for row in rows]}
    text = json.dumps(to_json(record), indent=2, allow_nan=False) + "\n"
    (target / "report.json").write_text(text, encoding="utf-8")
    pictures = {}
    if any(row.win_rate or row.task_accuracy for row in rows):
        pictures["Policies"] = draw_policies(rows, target / "policies.png")
    if curves and any(curves.values()):
        pictures["Training curves"] = draw_training_curves(curves, target / "training_curves.png")
    (target / "report.md").write_text(_markdown(rows, notes or {}, pictures), encoding="utf-8")
    return [target / "report.json", target / "report.md", *pictures.values()]


def write_samples(path: Path, prompts: Sequence[Prompt], completions: Mapping[str, Sequence[str]]) -> None:
    """Write one line of JSON per prompt, with the completion of each policy by name."""
    with path.open("w", encoding="utf-8") as stream:
        for index, prompt in enumerate(prompts):
            line = {"prompt": prompt, **{name: texts[index] for name, texts in completions.items()}}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def policy_table(rows: Sequence[PolicyRow], title: str | None = None) -> list[RenderableType]:
    """One line per policy as a table of at most 80 columns, and its footnote; columns without values are left out."""
    heading = None if title is None else Text(title)
    table = Table(title=heading, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("policy", no_wrap=True)
    columns = _columns(rows)
    for metric in columns:
        table.add_column(metric.column, justify="right")
    for row in rows:
        # The interval goes below its value, without a space, which keeps the table inside 80 columns.
        cells = [cell.replace(" (", "\n[", 1).replace(" to ", ",").replace(")", "]") for cell in _cells(row, columns)]
        table.add_row(row.name, *map(Text, cells))
    intervals = any(isinstance(getattr(row, metric.attribute), Estimate) for row in rows for metric in columns)
    return [table, Text("Below a value: its 95 % interval.", style="dim")] if intervals else [table]


def print_table(rows: Sequence[PolicyRow], console: Console | None = None, title: str | None = None) -> None:
    """Print `policy_table`, by default on standard output."""
    for shown in policy_table(rows, title):
        (console or Console()).print(shown)


def _columns(rows: Sequence[PolicyRow]) -> list[Metric]:
    """The metrics with a column that any policy has, in the order of `PolicyRow`'s attributes."""
    by_attribute = {metric.attribute: metric for metric in METRICS if metric.column}
    measured = [field.name for field in fields(PolicyRow) if any(getattr(row, field.name) is not None for row in rows)]
    return [by_attribute[name] for name in measured if name in by_attribute]


def _cells(row: PolicyRow, columns: Sequence[Metric]) -> list[str]:
    return [_cell(getattr(row, metric.attribute), metric.kind == "share") for metric in columns]


def _cell(value: Estimate | float | None, share: bool) -> str:
    """`62.0 % (55.1 to 68.4)`, `1.23`, or a dash."""
    if value is None:
        return "–"
    factor, unit, digits = (100, " %", 1) if share else (1, "", 2)
    parts = value if isinstance(value, tuple) else (value,)
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    shown = [f"{round(factor * part, digits) + 0.0:.{digits}f}" if math.isfinite(part) else "–" for part in parts]
    return f"{shown[0]}{unit}" + (f" ({shown[1]} to {shown[2]})" if len(shown) == 3 else "")


def _markdown(rows: Sequence[PolicyRow], notes: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    columns = _columns(rows)
    headings = ["policy", *(metric.column.replace("\n", " ") for metric in columns)]
    lines = ["# Evaluation", "", *_table(headings, [[row.name, *_cells(row, columns)] for row in rows]), ""]
    lines += ["In parentheses: 95 % intervals. A tie is half a win.", ""]
    lines += [f"- {name}: {value}" for name, value in notes.items()] + ([""] if notes else [])
    tasks = sorted({task for row in rows for task in row.task_accuracy_by_task})
    if tasks:
        cells = [[task, *(_cell(row.task_accuracy_by_task.get(task), True) for row in rows)] for task in tasks]
        lines += ["## Accuracy by task", "", *_table(["task", *(row.name for row in rows)], cells), ""]
    return "\n".join(lines) + "".join(f"\n![{title}]({path.name})\n" for title, path in pictures.items())


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, numbers to the right."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (headings, *rows))
    return [head, "|---|" + "---:|" * (len(headings) - 1), *lines]
