"""Printed summary, table and picture of benchmarks/ppo.py."""

from __future__ import annotations

from pathlib import Path

from common.report import BLUE, ORANGE, Run, finish_ratios, markdown, note, ratio_chart, times_faster
from sides.job import OURS, PEER

NAMES = {PEER: "TRL 1.12.0", OURS: "this package"}
TRAIN = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
LENGTHS = {"equal": "equal lengths", "varying": "varying lengths"}
_COLUMNS = (
    *("model", "training", "answers: longest, mean of both", "episodes, steps", *NAMES.values()),
    *("times faster (by processor time)", "peak memory, TRL 1.12.0", "this package", "ratio (above the models)"),
)


def describe(run: Run) -> str:
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
    worst = max(max(differences.values()) for differences in run["equality"].values())
    lines.append(
        f"  {faster['min']:.2f}x faster by minima, {faster['median']:.2f}x by medians, {less['median']:.2f}x by "
        f"processor time, memory {run['memory_of_peer']:.2f}x, above the models "
        f"{run['memory_above_models_of_peer']:.2f}x; largest relative difference on stored answers {worst:.0e}"
    )
    return "\n".join(lines)


def draw(runs: list[Run], chart: Path) -> None:
    """Times faster than TRL, and peak memory, by model, training and lengths."""
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(f"{run['model']}, {run['dtype']}", []).append(run)
    with ratio_chart(chart, models, base=0.6, group=0.9, case=0.35) as groups:
        for title, cases, time_axes, memory_axes in groups:
            for place, run in enumerate(cases):
                memory = run["memory_of_peer"]
                times_faster(time_axes, run["times_faster"], place, BLUE, 7)
                memory_axes.plot([memory], [place], "s", color=ORANGE, markersize=6)
                note(memory_axes, f"{memory:.2f}", (memory, place), 7, color=ORANGE, fontsize="small")
            labels = [f"{TRAIN[run['train']]}, {run['lengths']}, {run['completion']} tokens" for run in cases]
            finish_ratios(time_axes, labels, "times faster than TRL 1.12.0", 1.2)
            finish_ratios(memory_axes, labels, "peak memory, TRL 1.12.0 = 1", 1.2)
            time_axes.set_title(title)


def table(runs: list[Run]) -> str:
    """The table of the documentation: medians over the rounds, and ratios to TRL."""
    rows = []
    for run in runs:
        means, faster = run["mean_length"], run["times_faster"]["median"]
        rows.append(
            [
                f"{run['model']}, {run['dtype']}",
                TRAIN[run["train"]],
                f"{run['lengths']}, {run['completion']}, {means[PEER]:.0f} and {means[OURS]:.0f}",
                f"{run['episodes']}, {run['optimizer_steps']}",
                *(f"{run['seconds'][name]['median']:.3g} s" for name in NAMES),
                f"{faster:.2f} ({run['times_less_processor']['median']:.2f})",
                *(f"{run['peak_mib'][name]:.0f} MiB" for name in NAMES),
                f"{run['memory_of_peer']:.2f} ({run['memory_above_models_of_peer']:.2f})",
            ]
        )
    return markdown(_COLUMNS, rows)
