"""What benchmarks/ppo_memory.py prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from ppo_report import TRAIN

from instructgpt_hf.evaluation.plots.style import BLUE, GREY, ORANGE

TARGET_GIB = 16


def draw(path: Path) -> Path:
    """Chart of a result file, beside it: what the loaded models take, and what an iteration takes above them."""
    runs = common.measured_runs(path)
    chart = path.with_suffix(".png")
    with common.figure(chart, 8.0, 1.5 + 0.45 * len(runs)) as figure:
        axes = figure.subplots()
        for place, run in enumerate(runs):
            models, peak = run["models_mib"] / 1024, run["peak_mib"] / 1024
            axes.barh(place, models, color=BLUE, height=0.5, label="models" if place == 0 else None)
            axes.barh(
                place,
                peak - models,
                left=models,
                color=ORANGE,
                height=0.5,
                label="an iteration, at its peak" if place == 0 else None,
            )
            axes.annotate(f"{peak:.1f}", (peak, place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.axvline(TARGET_GIB, color=GREY, linewidth=1, linestyle=":")
        axes.annotate("a 16 GB card", (TARGET_GIB, -0.45), xytext=(-5, 0), textcoords="offset points", ha="right")
        axes.set_yticks(range(len(runs)), [_label(run) for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlim(0, 1.1 * max(TARGET_GIB, *(run["peak_mib"] / 1024 for run in runs)))
        axes.set_xlabel("memory, GiB")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, frameon=False)
    return chart


def table(path: Path) -> str:
    """A result file as the table of the documentation."""
    lines = [
        "| model | training | tokens of a prompt, of an answer | episodes, in a pass without and with gradient "
        "| models | peak of loading | peak of an iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in common.read_runs(path):
        passes = run["sizes"]
        cells = [
            f"{run['model']}, {run['dtype']}",
            TRAIN[run["train"]],
            f"{run['prompt'][1]}, {run['completion']}",
            f"{run['episodes']}, {passes['rollout_batch']} and {passes['micro_batch']}",
            *(f"{run[name] / 1024:.1f} GiB" for name in ("models_mib", "loading_mib", "peak_mib")),
        ]
        lines.append(common.table_row(cells))
    return "\n".join(lines)


def _label(run: dict[str, Any]) -> str:
    return f"{run['model']}, {TRAIN[run['train']]},\n{run['prompt'][1]} + {run['completion']} tokens"
