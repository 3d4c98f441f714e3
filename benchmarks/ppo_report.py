"""What benchmarks/ppo.py prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common

from instructgpt_hf.evaluation.plots.style import BLUE, GREY, ORANGE

PEER, OURS = "trl", "ours"
NAMES = {PEER: "TRL 1.12.0", OURS: "this package"}
TRAIN = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
LENGTHS = {"equal": "equal lengths", "varying": "varying lengths"}


def describe(run: dict[str, Any]) -> str:
    """A run in a few lines."""
    lines = [
        f"{TRAIN[run['train']]}, {LENGTHS[run['lengths']]}: {run['episodes']} episodes of up to "
        f"{run['completion']} tokens, {run['optimizer_steps']} optimizer steps"
    ]
    for name, title in NAMES.items():
        seconds = run["seconds"][name]
        lines.append(
            f"  {title:14}{seconds['min']:9.2f} s min {seconds['median']:9.2f} s median"
            f" {run['peak_mib'][name]:8.0f} MiB, {run['peak_above_models_mib'][name]:8.0f} above the models,"
            f" mean length {run['mean_length'][name]:.1f}"
        )
    faster, less = run["times_faster"], run["times_less_processor"]
    worst = max(max(found.values()) for found in run["equality"].values())
    lines.append(
        f"  {faster['min']:.2f}x faster by minima, {faster['median']:.2f}x by medians, {less['median']:.2f}x by "
        "processor time, memory "
        f"{run['memory_of_peer']:.2f}x, above the models {run['memory_above_models_of_peer']:.2f}x; "
        f"largest relative difference on stored answers {worst:.0e}"
    )
    return "\n".join(lines)


def draw(path: Path) -> Path:
    """Chart of a result file, beside it: times faster than TRL, and peak memory, by model, training and lengths."""
    runs = common.measured_runs(path)
    models: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        models.setdefault(f"{run['model']}, {run['dtype']}", []).append(run)
    chart = path.with_suffix(".png")
    with common.figure(chart, 9.6, 0.6 + sum(0.9 + 0.35 * len(found) for found in models.values())) as figure:
        heights = [1 + len(found) for found in models.values()]
        grid = figure.subplots(len(models), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes, (title, found) in zip(grid, models.items(), strict=True):
            _draw_model(axes[0], axes[1], title, found)
    return chart


def _draw_model(time_axes: Any, memory_axes: Any, title: str, runs: list[dict[str, Any]]) -> None:
    for place, run in enumerate(runs):
        faster, memory = run["times_faster"], run["memory_of_peer"]
        time_axes.plot([min(faster["all"]), max(faster["all"])], [place, place], color=BLUE, linewidth=2)
        time_axes.plot([faster["median"]], [place], "o", color=BLUE, markersize=6)
        memory_axes.plot([memory], [place], "s", color=ORANGE, markersize=6)
        for axes, text, end, color in (
            (time_axes, f"{faster['median']:.1f}x", max(faster["all"]), BLUE),
            (memory_axes, f"{memory:.2f}", memory, ORANGE),
        ):
            style = dict(textcoords="offset points", va="center", color=color, fontsize="small")
            axes.annotate(text, (end, place), xytext=(7, 0), **style)
    labels = [f"{TRAIN[run['train']]}, {run['lengths']}, {run['completion']} tokens" for run in runs]
    for axes, label in ((time_axes, "times faster than TRL 1.12.0"), (memory_axes, "peak memory, TRL 1.12.0 = 1")):
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * max(1.0, axes.get_xlim()[1]))
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    time_axes.set_title(title)


def table(path: Path) -> str:
    """A result file as the table of the documentation: medians over the rounds, and ratios to TRL."""
    lines = [
        "| model | training | answers: longest, mean of both | episodes, steps | TRL 1.12.0 | this package "
        "| times faster (by processor time) | peak memory, TRL 1.12.0 | this package | ratio (above the models) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in common.read_runs(path):
        means, faster = run["mean_length"], run["times_faster"]["median"]
        cells = [
            f"{run['model']}, {run['dtype']}",
            TRAIN[run["train"]],
            f"{run['lengths']}, {run['completion']}, {means[PEER]:.0f} and {means[OURS]:.0f}",
            f"{run['episodes']}, {run['optimizer_steps']}",
            *(f"{run['seconds'][name]['median']:.3g} s" for name in NAMES),
            f"{faster:.2f} ({run['times_less_processor']['median']:.2f})",
            *(f"{run['peak_mib'][name]:.0f} MiB" for name in NAMES),
            f"{run['memory_of_peer']:.2f} ({run['memory_above_models_of_peer']:.2f})",
        ]
        lines.append(common.table_row(cells))
    return "\n".join(lines)
