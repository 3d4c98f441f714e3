"""Printed summary, table and picture of benchmarks/overfitting.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from common.report import BLUE, GREY, ORANGE, Run, figure, interval, legend_below, markdown
from common.results import mean_interval
from matplotlib.axes import Axes

RANKINGS, PAIRS = "rankings", "pairs"
ARMS = {RANKINGS: "a prompt's pairs together", PAIRS: "pairs shuffled"}
# Compared at the end of a pass.
MEASURES = ("held_out_loss", "held_out_accuracy", "training_loss", "gap", "rise")
_PARTS = {**ARMS, "pairs_minus_rankings": "difference"}
_PANELS = (
    ("training_loss", "Training loss", "nats per pair"),
    ("held_out_loss", "Held-out loss", "nats per pair"),
    ("held_out_accuracy", "Held-out accuracy", "pairs ordered right"),
)
_STYLES = {RANKINGS: (BLUE, "-"), PAIRS: (ORANGE, "--")}


def describe(entry: dict[str, Any]) -> str:
    """One entry of the summary in a few lines."""
    lines = [f"learning rate {entry['learning_rate']:g}, end of pass {entry['pass']}, {len(entry['seeds'])} seeds"]
    for name in MEASURES:
        rankings, pairs, difference = (interval(entry[part][name], "+.4f") for part in _PARTS)
        lines.append(f"  {name:18} rankings {rankings}  pairs {pairs}  difference {difference}")
    return "\n".join(lines)


def table(runs: list[Run]) -> str:
    """The table of the documentation: means over seeds with 95 % intervals."""
    rows = []
    for run in runs:
        layers = "" if run["layers"] is None else f", first {run['layers']} layers"
        title = f"{run['dataset']}, {run['model']}{layers}"
        for entry, name in itertools.product(run["summary"], MEASURES):
            values = [interval(entry[part][name], ".3f") for part in _PARTS]
            rows.append(
                [title, f"{entry['learning_rate']:g}", f"{entry['pass']}", name.replace("_", " "), *values],
            )
    return markdown(["rankings, model", "learning rate", "after pass", "measure", *_PARTS.values()], rows)


def draw(runs: list[Run], chart: Path) -> None:
    """Curves of the last run; one line of panels for each learning rate."""
    curves, passes = runs[-1]["curves"], runs[-1]["settings"]["passes"]
    rates = sorted({curve["learning_rate"] for curve in curves})
    with figure(chart, 12.6, 0.5 + 3.1 * len(rates)) as made:
        grid = made.subplots(len(rates), len(_PANELS), squeeze=False)
        for line, rate in zip(grid, rates, strict=True):
            same_rate = [curve for curve in curves if curve["learning_rate"] == rate]
            for axes, (key, title, unit) in zip(line, _PANELS, strict=True):
                _draw_panel(axes, key, same_rate, passes)
                axes.set_title(f"{title}, learning rate {rate:g}" if len(rates) > 1 else title)
                axes.set_ylabel(unit)
        legend_below(made, grid[0][0])


def _draw_panel(axes: Axes, key: str, curves: list[dict[str, Any]], passes: int) -> None:
    """Every seed as a thin line, the mean over seeds as a thick one within its 95 % interval."""
    for arm, (color, style) in _STYLES.items():
        lines = [[(p["pass"], p[key]) for p in curve["points"] if key in p] for curve in curves if curve["arm"] == arm]
        if not lines:
            continue
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, linestyle=style, linewidth=0.8, alpha=0.3)
        places = [place for place, _ in lines[0]]
        intervals = [mean_interval([line[index][1] for line in lines]) for index in range(len(places))]
        mean, low, high = ([item[end] for item in intervals] for end in ("mean", "low", "high"))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(places, mean, color=color, linestyle=style, linewidth=2, label=ARMS[arm])
    for number in range(1, passes):
        axes.axvline(number, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel("passes over the rankings")
    axes.grid(axis="x", visible=False)
