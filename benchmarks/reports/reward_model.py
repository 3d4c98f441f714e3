"""Printed summary, table and picture of benchmarks/reward_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.report import BLUE, ORANGE, Run, finish_ratios, legend_below, markdown, ratio_chart, times_faster

TRL, PER_COMPLETION, SHARED = "trl", "per_completion", "shared_prefix"
NAMES = {TRL: "TRL, all pairs", PER_COMPLETION: "one row per completion", SHARED: "shared prefix"}
_STYLES: dict[str, tuple[str, str, float]] = {PER_COMPLETION: (BLUE, "s", -0.12), SHARED: (ORANGE, "o", 0.12)}
_COLUMNS = (
    *("model, training", "K", "prompt:completion", "prompts a step", *["TRL", *list(NAMES.values())[1:]]),
    *("times faster", "peak memory, TRL", "shared prefix"),
)


def shape(case: dict[str, Any]) -> str:
    """A case's number of completions, and prompt and completion tokens."""
    return f"K = {case['completions']}, {case['prompt']}:{case['completion']}"


def describe(case: dict[str, Any]) -> str:
    """A case in a few lines."""
    lines = [
        f"{shape(case)}, {case['prompts']} prompts, {case['pairs']} pairs a step; "
        f"{case['trl_micro_batch']} pairs in a pass of TRL"
    ]
    for name, title in NAMES.items():
        seconds, line = case["seconds"][name], f"  {title:24}"
        line += f"{seconds['min']:9.3f} s min {seconds['median']:9.3f} s median {case['peak_mib'][name]:8.0f} MiB"
        if name != TRL:
            faster, equality = case["times_faster"][name], case["equality"]
            same = equality.get("exact", equality["measured"])[name]
            line += f"  {faster['min']:6.1f}x min {faster['median']:6.1f}x median"
            line += f", memory {case['memory_of_trl'][name]:.2f}x"
            line += f"; loss and gradient in float32 differ by {same['loss']:.0e} and {same['gradient']:.0e}"
        lines.append(line)
    return "\n".join(lines)


def _by_model(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """Cases by model, training and dtype, in the order of K, then from long prompts to long completions."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{run['model']}, {run['train']}, {run['dtype']}", []).extend(run["cases"])
    for cases in groups.values():
        cases.sort(key=lambda case: (case["completions"], case["completion"] / case["prompt"]))
    return groups


def draw(runs: list[Run], chart: Path) -> None:
    """Times faster than TRL, and peak memory, by model and shape of rankings."""
    with ratio_chart(chart, _by_model(runs), base=1.0, group=0.6, case=0.42) as groups:
        for title, cases, time_axes, memory_axes in groups:
            for name, (color, marker, offset) in _STYLES.items():
                for place, case in enumerate(cases):
                    label = NAMES[name] if place == 0 else None
                    times_faster(time_axes, case["times_faster"][name], place + offset, color, 6, marker, label)
                    memory_axes.plot(
                        [case["memory_of_trl"][name]], [place + offset], marker, color=color, markersize=6
                    )
            labels = [shape(case) for case in cases]
            finish_ratios(time_axes, labels, "times faster than TRL on all pairs", 1.15)
            finish_ratios(memory_axes, labels, "peak memory, TRL = 1", 1.15)
            time_axes.set_title(title)
        legend_below(time_axes.figure, groups[0][2])


def table(runs: list[Run]) -> str:
    """The table of the documentation: medians over the rounds, and ratios to TRL."""
    rows = []
    for title, cases in _by_model(runs).items():
        for case in cases:
            faster = {name: f"{item['median']:.1f}" for name, item in case["times_faster"].items()}
            rows.append(
                [
                    *(title, f"{case['completions']}", f"{case['prompt']}:{case['completion']}", f"{case['prompts']}"),
                    *(f"{case['seconds'][name]['median']:.3g} s" for name in NAMES),
                    f"{faster[SHARED]} (per completion {faster[PER_COMPLETION]})",
                    *(f"{case['peak_mib'][name]:.0f} MiB" for name in (TRL, SHARED)),
                ]
            )
    return markdown(_COLUMNS, rows)
