"""Printed summary, table and picture of benchmarks/ppo_learning.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common.report import BLUE, ORANGE, Run, figure, interval, legend_below, markdown
from common.results import paired
from matplotlib.axes import Axes

from reports.ppo import NAMES, OURS, PEER

# The end of a curve is the mean of this many iterations.
LAST = 5
MEASURES = {"reward": "reward model's score", "gold": "gold labeler's score", "kl": "KL to SFT, nats"}
_SIDES = {**NAMES, "ours_minus_trl": "difference"}
_STYLES = {PEER: (ORANGE, "--"), OURS: (BLUE, "-")}
_PANELS = (
    ("episodes", "reward", "Reward by episodes", "episodes"),
    ("seconds", "reward", "Reward by time", "seconds of processor time"),
    ("episodes", "gold", "Gold labeler's score", "episodes"),
)


def summarise(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Both sides' ends of their curves, as `paired` gives them, and `times_faster` by seed."""
    ends = {
        (curve["side"], curve["seed"]): {
            **{name: statistics.fmean(point[name] for point in curve["points"][-LAST:]) for name in MEASURES},
            "seconds": curve["seconds"],
        }
        for curve in curves
    }
    summary = paired(ends, PEER, OURS, list(MEASURES))
    seconds = {arm: [ends[arm, seed]["seconds"] for seed in summary["seeds"]] for arm in NAMES}
    return {**summary, "times_faster": [peer / ours for peer, ours in zip(*seconds.values(), strict=True)]}


def describe(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""
    lines = [f"seeds {summary['seeds']}, the last {LAST} iterations"]
    for name, title in MEASURES.items():
        parts = [f"{NAMES.get(side, side)} {interval(summary[side][name], '.2f')}" for side in _SIDES]
        lines.append(f"  {title}: {'; '.join(parts)}")
    lines.append(f"  times faster by seed: {', '.join(f'{value:.2f}' for value in summary['times_faster'])}")
    return "\n".join(lines)


def table(runs: list[Run]) -> str:
    """The table of the documentation: means over seeds with 95 % intervals."""
    rows = []
    for summary in (run["summary"] for run in runs):
        rows += [[MEASURES[name], *(interval(summary[side][name], ".2f") for side in _SIDES)] for name in MEASURES]
        seconds = [f"{summary[side]['seconds']['mean']:.0f} s" for side in NAMES]
        faster = summary["times_faster"]
        rows.append(["processor time", *seconds, f"{min(faster):.2f} to {max(faster):.2f} times faster"])
    return markdown([f"mean of the last {LAST} iterations", *_SIDES.values()], rows)


def draw(runs: list[Run], chart: Path) -> None:
    """Reward and gold score of the last run, by episodes and by time."""
    with figure(chart, 12.6, 3.8) as made:
        panels = made.subplots(1, len(_PANELS))
        for axes, panel in zip(panels, _PANELS, strict=True):
            _draw_panel(axes, *panel, runs[-1]["curves"])
        legend_below(made, panels[0])


def _draw_panel(axes: Axes, place: str, measure: str, title: str, unit: str, curves: list[dict[str, Any]]) -> None:
    """Every seed as a thin line, and the mean over seeds, at the mean place, as a thick one."""
    for side, (color, style) in _STYLES.items():
        lines = [
            [[point[name] for point in curve["points"]] for name in (place, measure)]
            for curve in curves
            if curve["side"] == side
        ]
        for line in lines:
            axes.plot(*line, style, color=color, alpha=0.3, linewidth=1)
        means = [[statistics.fmean(values) for values in zip(*same, strict=True)] for same in zip(*lines, strict=True)]
        axes.plot(*means, style, color=color, linewidth=2, label=NAMES[side])
    axes.set_title(title)
    axes.set_xlabel(unit)
