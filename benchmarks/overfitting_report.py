"""What benchmarks/overfitting.py prints and draws of its results."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import common

from instructgpt_hf.evaluation.plots.style import BLUE, GREY, ORANGE

RANKINGS, PAIRS = "rankings", "pairs"
ARMS = {RANKINGS: "a prompt's pairs together", PAIRS: "pairs shuffled"}
# What is compared at the end of a pass.
MEASURES = ("held_out_loss", "held_out_accuracy", "training_loss", "gap", "rise")


def describe(entry: dict[str, Any]) -> str:
    """One entry of the summary in a few lines."""
    lines = [f"learning rate {entry['learning_rate']:g}, end of pass {entry['pass']}, {len(entry['seeds'])} seeds"]
    for name in MEASURES:
        shown = [entry[part][name] for part in (*ARMS, "pairs_minus_rankings")]
        texts = [f"{item['mean']:+.4f} ({item['low']:+.4f} to {item['high']:+.4f})" for item in shown]
        lines.append(f"  {name:18} rankings {texts[0]}  pairs {texts[1]}  difference {texts[2]}")
    return "\n".join(lines)


def table(path: Path) -> str:
    """A result file as the table of the documentation: means over seeds with 95 % intervals."""
    lines = [
        "| rankings, model | learning rate | after pass | measure | a prompt's pairs together | pairs shuffled "
        "| difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in common.read_runs(path):
        layers = "" if run["layers"] is None else f", first {run['layers']} layers"
        for entry, name in itertools.product(run["summary"], MEASURES):
            parts = (entry[part][name] for part in (*ARMS, "pairs_minus_rankings"))
            values = " | ".join(f"{item['mean']:.3f} ({item['low']:.3f} to {item['high']:.3f})" for item in parts)
            lines.append(
                f"| {run['dataset']}, {run['model']}{layers} | {entry['learning_rate']:g} | {entry['pass']} "
                f"| {name.replace('_', ' ')} | {values} |"
            )
    return "\n".join(lines)


_PANELS = (
    ("training_loss", "Training loss", "nats per pair"),
    ("held_out_loss", "Held-out loss", "nats per pair"),
    ("held_out_accuracy", "Held-out accuracy", "pairs ordered right"),
)
_STYLES = {RANKINGS: (BLUE, "-"), PAIRS: (ORANGE, "--")}


def draw(path: Path) -> Path:
    """Picture of the last run of a result file, beside it; one line of panels for each learning rate."""
    runs = common.measured_runs(path)
    run, chart = runs[-1], path.with_suffix(".png")
    rates = sorted({curve["learning_rate"] for curve in run["curves"]})
    with common.figure(chart, 12.6, 0.5 + 3.1 * len(rates)) as figure:
        grid = figure.subplots(len(rates), len(_PANELS), squeeze=False)
        for line, rate in zip(grid, rates, strict=True):
            for axes, panel in zip(line, _PANELS, strict=True):
                curves = [curve for curve in run["curves"] if curve["learning_rate"] == rate]
                _draw_panel(axes, *panel, curves, run["settings"]["passes"])
                if len(rates) > 1:
                    axes.set_title(f"{panel[1]}, learning rate {rate:g}")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return chart


def _draw_panel(axes: Any, key: str, title: str, unit: str, curves: list[dict[str, Any]], passes: int) -> None:
    for arm, (color, style) in _STYLES.items():
        lines = [[(p["pass"], p[key]) for p in curve["points"] if key in p] for curve in curves if curve["arm"] == arm]
        if not lines:
            continue
        places = [place for place, _ in lines[0]]
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, linestyle=style, linewidth=0.8, alpha=0.3)
        intervals = [common.mean_interval([line[index][1] for line in lines]) for index in range(len(places))]
        low, high = ([item[end] for item in intervals] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        means = [item["mean"] for item in intervals]
        axes.plot(places, means, color=color, linestyle=style, linewidth=2, label=ARMS[arm])
    for number in range(1, passes):
        axes.axvline(number, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.set_title(title)
    axes.set_xlabel("passes over the rankings")
    axes.set_ylabel(unit)
    axes.grid(axis="x", visible=False)
