"""What benchmarks/ppo.py prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from common import BenchmarkError

from instructgpt_hf.evaluation.style import BLUE, GREY, ORANGE

PEER, OURS = "trl", "ours"
NAMES = {PEER: "TRL 1.12.0", OURS: "this package"}
TRAIN = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
LENGTHS = {"equal": "equal lengths", "varying": "varying lengths"}


def describe(case: dict[str, Any]) -> str:
    """A case in a few lines."""
    lines = [
        f"{TRAIN[case['train']]}, {LENGTHS[case['lengths']]}: {case['episodes']} episodes of up to "
        f"{case['completion']} tokens, {case['optimizer_steps']} optimizer steps"
    ]
    for name, title in NAMES.items():
        seconds = case["seconds"][name]
        lines.append(
            f"  {title:14}{seconds['min']:9.2f} s min {seconds['median']:9.2f} s median"
            f" {case['peak_mib'][name]:8.0f} MiB, {case['peak_above_models_mib'][name]:8.0f} above the models,"
            f" mean length {case['mean_length'][name]:.1f}"
        )
    faster, less = case["times_faster"], case["times_less_processor"]
    worst = max(max(found.values()) for found in case["equality"].values())
    lines.append(
        f"  {faster['min']:.2f}x faster by minima, {faster['median']:.2f}x by medians, {less['median']:.2f}x by "
        "processor time, memory "
        f"{case['memory_of_peer']:.2f}x, above the models {case['memory_above_models_of_peer']:.2f}x; "
        f"largest relative difference on stored answers {worst:.0e}"
    )
    return "\n".join(lines)


def _label(case: dict[str, Any]) -> str:
    return f"{TRAIN[case['train']]}, {case['lengths']}"


def draw(path: Path) -> Path:
    """Chart of a result file, beside it: times faster than TRL, and peak memory, by model, training and lengths."""
    runs = common.read_runs(path)
    if not runs:
        raise BenchmarkError(f"{path}: nothing has been measured yet")
    chart = path.with_suffix(".png")
    with common.figure(chart, 9.6, 0.8 + sum(0.8 + 0.4 * len(run["cases"]) for run in runs)) as figure:
        heights = [1 + len(run["cases"]) for run in runs]
        grid = figure.subplots(len(runs), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
        for row, run in zip(grid, runs, strict=True):
            _draw_run(row[0], row[1], run)
    return chart


def _draw_run(time_axes: Any, memory_axes: Any, run: dict[str, Any]) -> None:
    for place, case in enumerate(run["cases"]):
        faster, memory = case["times_faster"], case["memory_of_peer"]
        time_axes.plot([min(faster["all"]), max(faster["all"])], [place, place], color=BLUE, linewidth=2)
        time_axes.plot([faster["median"]], [place], "o", color=BLUE, markersize=6)
        memory_axes.plot([memory], [place], "s", color=ORANGE, markersize=6)
        for axes, value, end, color in (
            (time_axes, f"{faster['median']:.2f}x", max(faster["all"]), BLUE),
            (memory_axes, f"{memory:.2f}", memory, ORANGE),
        ):
            axes.annotate(
                value,
                (end, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize="small",
            )
    labels = [_label(case) for case in run["cases"]]
    for axes, title in ((time_axes, "times faster than TRL 1.12.0"), (memory_axes, "peak memory, TRL 1.12.0 = 1")):
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1.2 * max(1.0, axes.get_xlim()[1]))
        axes.set_xlabel(title)
        axes.grid(axis="y", visible=False)
    time_axes.set_title(f"{run['model']}, {run['dtype']}")


def table(path: Path) -> str:
    """A result file as the table of the documentation: medians over the rounds, and ratios to TRL."""
    lines = [
        "| model | training | answers: longest, mean of both | episodes, steps | TRL 1.12.0 | this package "
        "| times faster (by processor time) | peak memory, TRL 1.12.0 | this package | ratio (above the models) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in common.read_runs(path):
        for case in run["cases"]:
            means, faster = case["mean_length"], case["times_faster"]["median"]
            cells = [
                f"{run['model']}, {run['dtype']}",
                TRAIN[case["train"]],
                f"{case['lengths']}, {case['completion']}, {means[PEER]:.0f} and {means[OURS]:.0f}",
                f"{case['episodes']}, {case['optimizer_steps']}",
                *(f"{case['seconds'][name]['median']:.3g} s" for name in NAMES),
                f"{faster:.2f} ({case['times_less_processor']['median']:.2f})",
                *(f"{case['peak_mib'][name]:.0f} MiB" for name in NAMES),
                f"{case['memory_of_peer']:.2f} ({case['memory_above_models_of_peer']:.2f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
