"""What benchmarks/ppo_learning.py prints and draws of its results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import common
from ppo_report import NAMES, OURS, PEER

from instructgpt_hf.evaluation.plots.style import BLUE, ORANGE

# The end of a curve is the mean of this many iterations.
LAST = 5
MEASURES = {"reward": "reward model's score", "gold": "gold labeler's score", "kl": "KL to SFT, nats"}
_STYLES = {PEER: (ORANGE, "--"), OURS: (BLUE, "-")}


def summarise(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """What both sides reach at the end of their curves, and how long that takes.

    Returns:
        By side, the mean and 95 % interval over seeds of each measure over the last iterations, and of the seconds;
        under `ours_minus_trl` those of the differences seed by seed, and `times_faster` by seed.
    """
    ends: dict[str, dict[int, dict[str, float]]] = {name: {} for name in NAMES}
    for curve in curves:
        last = curve["points"][-LAST:]
        found = {name: statistics.fmean(point[name] for point in last) for name in MEASURES}
        ends[curve["side"]][curve["seed"]] = {**found, "seconds": curve["seconds"]}
    seeds = sorted(ends[PEER].keys() & ends[OURS].keys())
    summary: dict[str, Any] = {"seeds": seeds}
    for side in NAMES:
        summary[side] = {
            name: common.mean_interval([ends[side][seed][name] for seed in seeds]) for name in (*MEASURES, "seconds")
        }
    summary["ours_minus_trl"] = {
        name: common.mean_interval([ends[OURS][seed][name] - ends[PEER][seed][name] for seed in seeds])
        for name in MEASURES
    }
    summary["times_faster"] = [ends[PEER][seed]["seconds"] / ends[OURS][seed]["seconds"] for seed in seeds]
    return summary


def describe(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""
    lines = [f"seeds {summary['seeds']}, the last {LAST} iterations"]
    for name, title in MEASURES.items():
        parts = [f"{NAMES.get(side, side)} {_interval(summary[side][name])}" for side in (*NAMES, "ours_minus_trl")]
        lines.append(f"  {title}: {'; '.join(parts)}")
    faster = ", ".join(f"{value:.2f}" for value in summary["times_faster"])
    lines.append(f"  times faster by seed: {faster}")
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def table(path: Path) -> str:
    """A result file as the table of the documentation: means over seeds with 95 % intervals."""
    lines = [
        f"| mean of the last {LAST} iterations | TRL 1.12.0 | this package | difference |",
        "|---|---|---|---|",
    ]
    for run in common.read_runs(path):
        summary = run["summary"]
        for name, title in MEASURES.items():
            parts = " | ".join(_interval(summary[side][name]) for side in (*NAMES, "ours_minus_trl"))
            lines.append(f"| {title} | {parts} |")
        seconds = [f"{summary[side]['seconds']['mean']:.0f} s" for side in NAMES]
        faster = f"{min(summary['times_faster']):.2f} to {max(summary['times_faster']):.2f} times faster"
        lines.append(f"| processor time | {' | '.join(seconds)} | {faster} |")
    return "\n".join(lines)


_PANELS = (
    ("episodes", "reward", "Reward by episodes", "episodes"),
    ("seconds", "reward", "Reward by time", "seconds of processor time"),
    ("episodes", "gold", "Gold labeler's score", "episodes"),
)


def draw(path: Path) -> Path:
    """Picture of the last run of a result file, beside it."""
    runs = common.measured_runs(path)
    chart = path.with_suffix(".png")
    with common.figure(chart, 12.6, 3.8) as figure:
        for axes, panel in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            _draw_panel(axes, *panel, runs[-1]["curves"])
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return chart


def _draw_panel(axes: Any, place: str, measure: str, title: str, unit: str, curves: list[dict[str, Any]]) -> None:
    """Every seed as a thin line, and the mean over seeds, at the mean place, as a thick one."""
    for side, (color, style) in _STYLES.items():
        lines = [curve["points"] for curve in curves if curve["side"] == side]
        for points in lines:
            across = [[point[name] for point in points] for name in (place, measure)]
            axes.plot(*across, style, color=color, alpha=0.3, linewidth=1)
        means = [
            [statistics.fmean(point[name] for point in points) for points in zip(*lines, strict=True)]
            for name in (place, measure)
        ]
        axes.plot(*means, style, color=color, linewidth=2, label=NAMES[side])
    axes.set_title(title)
    axes.set_xlabel(unit)
