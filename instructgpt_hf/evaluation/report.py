"""The evaluation report: report.json, report.md, a table on the terminal and two pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from instructgpt_hf.evaluation.intervals import Estimate
from instructgpt_hf.evaluation.results import PolicyRow

# Attribute, heading in two lines, digits, whether the value is a share shown in percent.
_COLUMNS = (
    ("win_rate", "win rate\nvs SFT", 1, True),
    ("task_accuracy", "task\naccuracy", 1, True),
    ("kl", "KL to SFT\n(nats)", 2, False),
    ("mean_reward", "mean\nreward", 2, False),
    ("gold_score", "gold\nscore", 2, False),
)


def write_report(
    folder: str | Path,
    rows: Sequence[PolicyRow],
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write report.json, report.md, policies.png and, with curves, training_curves.png.

    Args:
        folder: created if it does not exist.
        rows: one per policy, in the order shown.
        curves: trainer log histories by stage (`sft`, `reward`, `ppo`, `ppo-ptx`); stages may be missing.
        notes: facts about the measurement by name, such as the judge and the number of prompts.

    Returns:
        The files written.
    """
    from instructgpt_hf.evaluation.plots.policies import draw_policies
    from instructgpt_hf.evaluation.plots.training_curves import draw_training_curves

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = [target / "report.json"]
    record = {"notes": dict(notes or {}), "policies": [asdict(row) for row in rows]}
    written[0].write_text(json.dumps(_plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    pictures = {}
    if any(row.win_rate or row.task_accuracy for row in rows):
        pictures["Policies"] = draw_policies(rows, target / "policies.png")
    if curves and any(curves.values()):
        pictures["Training curves"] = draw_training_curves(curves, target / "training_curves.png")
    text = "\n".join(["# Evaluation", "", *_markdown_table(rows), "", *_notes(notes), *_by_task(rows)])
    text += "".join(f"\n![{title}]({path.name})\n" for title, path in pictures.items())
    (target / "report.md").write_text(text, encoding="utf-8")
    return [*written, target / "report.md", *pictures.values()]


def print_table(rows: Sequence[PolicyRow], console: Any = None, title: str | None = None) -> None:
    """Print the rows as a table; columns that nobody measured are left out.

    Args:
        rows: one per policy.
        console: a `rich.console.Console`; standard output by default.
        title: above the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for _, heading, _, _ in _used_columns(rows):
        table.add_column(heading, justify="right")
    for row in rows:
        # The interval goes below its value, which keeps the table inside 80 columns.
        cells = [cell.replace(" (", "\n[", 1).replace(" to ", ", ").replace(")", "]") for cell in _cells(row, rows)]
        table.add_row(row.name, *map(Text, cells))
    (console or Console()).print(table)
    if any(isinstance(getattr(row, column[0]), Estimate) for row in rows for column in _COLUMNS):
        (console or Console()).print("Below a value: its 95 % interval.", style="dim")


def _used_columns(rows: Sequence[PolicyRow]) -> list[tuple[str, str, int, bool]]:
    return [column for column in _COLUMNS if any(getattr(row, column[0]) is not None for row in rows)]


def _cells(row: PolicyRow, rows: Sequence[PolicyRow]) -> list[str]:
    return [_cell(getattr(row, name), digits, share) for name, _, digits, share in _used_columns(rows)]


def _cell(value: Estimate | float | None, digits: int, share: bool) -> str:
    """`62.0 % (55.1 to 68.4)`, `1.23`, or a dash."""
    if value is None:
        return "–"
    factor, unit = (100, " %") if share else (1, "")
    parts = value if isinstance(value, tuple) else (value,)
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    shown = [f"{round(factor * part, digits) + 0.0:.{digits}f}" if math.isfinite(part) else "–" for part in parts]
    return f"{shown[0]}{unit}" + (f" ({shown[1]} to {shown[2]})" if len(shown) == 3 else "")


def _markdown_table(rows: Sequence[PolicyRow]) -> list[str]:
    headings = [heading.replace("\n", " ") for _, heading, _, _ in _used_columns(rows)]
    lines = ["| policy | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    return lines + ["| " + " | ".join([row.name, *_cells(row, rows)]) + " |" for row in rows]


def _notes(notes: Mapping[str, Any] | None) -> list[str]:
    lines = ["In parentheses: 95 % intervals. A tie is half a win.", ""]
    return lines + [f"- {name}: {value}" for name, value in (notes or {}).items()] + ([""] if notes else [])


def _by_task(rows: Sequence[PolicyRow]) -> list[str]:
    tasks = sorted({task for row in rows for task in row.task_accuracy_by_task})
    if not tasks:
        return []
    lines = ["## Accuracy by task", "", "| task | " + " | ".join(row.name for row in rows) + " |"]
    lines.append("|---|" + "---:|" * len(rows))
    for task in tasks:
        cells = [_cell(row.task_accuracy_by_task.get(task), 1, True) for row in rows]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _plain(value: Any) -> Any:
    """`value` as JSON holds it: estimates as objects, numbers that are not finite as null."""
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        # dataclasses.asdict rebuilds named tuples, so an Estimate inside a list arrives as one.
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
