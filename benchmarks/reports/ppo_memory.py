"""Table and picture of benchmarks/ppo_memory.py."""

from __future__ import annotations

from pathlib import Path

from common.report import BLUE, GREY, ORANGE, Run, figure, list_cases, markdown, note

from reports.ppo import TRAIN

TARGET_GIB = 16
_COLUMNS = (
    *("model", "training", "tokens of a prompt, of an answer", "episodes, in a pass without and with gradient"),
    *("models", "peak of loading", "peak of an iteration"),
)


def draw(runs: list[Run], chart: Path) -> None:
    """Memory of the loaded models, and of an iteration above them."""
    with figure(chart, 8.0, 1.5 + 0.45 * len(runs)) as made:
        axes = made.subplots()
        models, peaks = ([run[name] / 1024 for run in runs] for name in ("models_mib", "peak_mib"))
        above = [peak - model for peak, model in zip(peaks, models, strict=True)]
        axes.barh(range(len(runs)), models, color=BLUE, height=0.5, label="models")
        axes.barh(range(len(runs)), above, left=models, color=ORANGE, height=0.5, label="an iteration, at its peak")
        for place, peak in enumerate(peaks):
            note(axes, f"{peak:.1f}", (peak, place), 5)
        axes.axvline(TARGET_GIB, color=GREY, linewidth=1, linestyle=":")
        axes.annotate("a 16 GB card", (TARGET_GIB, -0.45), xytext=(-5, 0), textcoords="offset points", ha="right")
        labels = [
            f"{run['model']}, {TRAIN[run['train']]},\n{run['prompt'][1]} + {run['completion']} tokens" for run in runs
        ]
        list_cases(axes, labels, "memory, GiB")
        axes.set_xlim(0, 1.1 * max(TARGET_GIB, *peaks))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, frameon=False)


def table(runs: list[Run]) -> str:
    """The table of the documentation."""
    rows = [
        [
            f"{run['model']}, {run['dtype']}",
            TRAIN[run["train"]],
            f"{run['prompt'][1]}, {run['completion']}",
            f"{run['episodes']}, {run['sizes']['rollout_batch']} and {run['sizes']['micro_batch']}",
            *(f"{run[name] / 1024:.1f} GiB" for name in ("models_mib", "loading_mib", "peak_mib")),
        ]
        for run in runs
    ]
    return markdown(_COLUMNS, rows)
