"""Picture of the policies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from instructgpt_hf.evaluation.plots.style import BLUE, GREEN, GREY, INK, ORANGE, name_rows, picture, write_above
from instructgpt_hf.evaluation.results import PolicyRow

_COLORS = {"base": GREY, "sft": GREEN, "ppo": BLUE, "ppo-ptx": ORANGE}
# Attribute of `PolicyRow`, title, label of the x axis, reference line.
_PANELS = (
    ("win_rate", "Win rate against the SFT model", "prompts won, ties half", 0.5),
    ("task_accuracy", "Accuracy on the pretraining tasks", "questions answered right", None),
)


def draw_policies(rows: Sequence[PolicyRow], path: str | Path) -> Path:
    """Draw win rate and task accuracy of every policy, from top to bottom, with their 95 % intervals.

    Args:
        rows: one per policy.
        path: the PNG to write; returned as a `Path`.
    """
    panels = [panel for panel in _PANELS if any(getattr(row, panel[0]) is not None for row in rows)]
    with picture(path, (5.2 * max(1, len(panels)), 1.3 + 0.55 * len(rows)), dpi=160) as figure:
        for number, panel in enumerate(panels, 1):
            _draw_intervals(figure.add_subplot(1, len(panels), number), rows, *panel)
    return Path(path)


def _draw_intervals(
    axes: Axes, rows: Sequence[PolicyRow], attribute: str, title: str, label: str, reference: float | None
) -> None:
    if reference is not None:
        axes.axvline(reference, color=GREY, linewidth=1.0, linestyle=":", zorder=1)
    for place, row in enumerate(rows):
        estimate = getattr(row, attribute)
        if estimate is None:
            continue
        color = _COLORS.get(row.name.lower(), INK)
        axes.plot([estimate.low, estimate.high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        for end in (estimate.low, estimate.high):
            axes.plot([end, end], [place - 0.13, place + 0.13], color=color, linewidth=2.2)
        axes.plot([estimate.value], [place], "o", color=color, markersize=8)
        write_above(axes, f"{100 * estimate.value:.1f} %", (estimate.value, place), color, 9)
    name_rows(axes, [row.name for row in rows], room=0.75)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(title=title, xlabel=f"{label}, with 95 % interval")
