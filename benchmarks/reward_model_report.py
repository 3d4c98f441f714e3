"""What benchmarks/reward_model.py prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from common import BenchmarkError

from instructgpt_hf.evaluation.plots.style import BLUE, GREY, ORANGE

TRL, PER_COMPLETION, SHARED = "trl", "per_completion", "shared_prefix"
NAMES = {TRL: "TRL, all pairs", PER_COMPLETION: "one row per completion", SHARED: "shared prefix"}


def shape(case: dict[str, Any]) -> str:
    """A case's number of completions, and prompt and completion tokens."""
    return f"K = {case['completions']}, {case['prompt']}:{case['completion']}"


def describe(found: dict[str, Any]) -> str:
    """A case in a few lines."""
    lines = [
        f"{shape(found)}, {found['prompts']} prompts, {found['pairs']} pairs a step; "
        f"{found['trl_micro_batch']} pairs in a pass of TRL"
    ]
    for name, title in NAMES.items():
        seconds, line = found["seconds"][name], f"  {title:24}"
        line += f"{seconds['min']:9.3f} s min {seconds['median']:9.3f} s median {found['peak_mib'][name]:8.0f} MiB"
        if name != TRL:
            faster, equality = found["times_faster"][name], found["equality"]
            same = equality.get("exact", equality["measured"])[name]
            line += f"  {faster['min']:6.1f}x min {faster['median']:6.1f}x median"
            line += f", memory {found['memory_of_trl'][name]:.2f}x"
            line += f"; loss and gradient in float32 differ by {same['loss']:.0e} and {same['gradient']:.0e}"
        lines.append(line)
    return "\n".join(lines)


def by_model(path: Path) -> list[dict[str, Any]]:
    """What a result file holds of each model, training and dtype: its `title` and the `cases` of all its runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in common.read_runs(path):
        found.setdefault(f"{run['model']}, {run['train']}, {run['dtype']}", []).extend(run["cases"])
    # By K, then from long prompts to long completions.
    order = {"key": lambda case: (case["completions"], case["completion"] / case["prompt"])}
    return [{"title": title, "cases": sorted(cases, **order)} for title, cases in found.items() if cases]


def draw(path: Path) -> Path:
    """Chart of a result file, beside it: times faster than TRL, and peak memory, by model and shape of rankings."""
    runs = by_model(path)
    if not runs:
        raise BenchmarkError(f"{path}: nothing has been measured yet")
    styles = {PER_COMPLETION: (BLUE, "s", -0.12), SHARED: (ORANGE, "o", 0.12)}
    chart = path.with_suffix(".png")
    with common.figure(chart, 9.6, 1.0 + sum(0.6 + 0.42 * len(run["cases"]) for run in runs)) as figure:
        grid = figure.subplots(
            len(runs), 2, squeeze=False, gridspec_kw={"height_ratios": [1 + len(run["cases"]) for run in runs]}
        )
        for row, run in zip(grid, runs, strict=True):
            _draw_run(row[0], row[1], run, styles)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return chart


def _draw_run(time_axes: Any, memory_axes: Any, run: dict[str, Any], styles: dict[str, Any]) -> None:
    labels = [shape(case) for case in run["cases"]]
    for name, (color, marker, offset) in styles.items():
        for place, case in enumerate(run["cases"]):
            faster, y = case["times_faster"][name], place + offset
            time_axes.plot([min(faster["all"]), max(faster["all"])], [y, y], color=color, linewidth=2)
            label = NAMES[name] if place == 0 else None
            time_axes.plot([faster["median"]], [y], marker, color=color, markersize=6, label=label)
            text = (f"{faster['median']:.1f}x", (max(faster["all"]), y))
            time_axes.annotate(
                *text, xytext=(6, 0), textcoords="offset points", va="center", color=color, fontsize="small"
            )
            memory_axes.plot([case["memory_of_trl"][name]], [y], marker, color=color, markersize=6)
    for axes, title in ((time_axes, "times faster than TRL on all pairs"), (memory_axes, "peak memory, TRL = 1")):
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.set_xlabel(title)
        axes.grid(axis="y", visible=False)
    time_axes.set_title(run["title"])


def table(path: Path) -> str:
    """A result file as the table of the documentation: medians over the rounds, and ratios to TRL."""
    lines = [
        "| model, training | K | prompt:completion | prompts a step | TRL | one row per completion | shared prefix "
        "| times faster | peak memory, TRL | shared prefix |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in by_model(path):
        for case in run["cases"]:
            seconds = " | ".join(f"{case['seconds'][name]['median']:.3g} s" for name in NAMES)
            faster, peaks = case["times_faster"], case["peak_mib"]
            lines.append(
                f"| {run['title']} | {case['completions']} "
                f"| {case['prompt']}:{case['completion']} | {case['prompts']} | {seconds} "
                f"| {faster[SHARED]['median']:.1f} (per completion {faster[PER_COMPLETION]['median']:.1f}) "
                f"| {peaks[TRL]:.0f} MiB | {peaks[SHARED]:.0f} MiB |"
            )
    return "\n".join(lines)
