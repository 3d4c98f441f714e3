"""Tables and pictures of result files: Markdown rows, figures in the style of the package's pictures, ratio charts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from instructgpt_hf.evaluation.plots.style import BLUE, GREEN, GREY, INK, ORANGE, STYLE

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE"]  # for the scripts

Run = dict[str, Any]


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """A Markdown table; a cell that is None is left blank."""
    lines = ["".join("| " if cell is None else f"| {cell} " for cell in row) + "|" for row in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def interval(item: dict[str, float], form: str) -> str:
    """A mean with its 95 % interval, each in the format `form`."""
    mean, low, high = (format(item[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


@contextlib.contextmanager
def figure(chart: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure in the style of the package's pictures, written to `chart` at the end of the block."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made
        chart.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(chart, dpi=160)


def legend_below(made: Figure, axes: Axes, place: str = "center", columns: int = 2) -> None:
    """The legend of one of the panels, below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    made.legend(handles, labels, loc=f"outside lower {place}", ncols=columns)


@contextlib.contextmanager
def ratio_chart(
    chart: Path, groups: dict[str, list[Run]], base: float, group: float, case: float
) -> Iterator[list[tuple[str, list[Run], Axes, Axes]]]:
    """Title, cases, and the axes of time and of memory for each group of cases.

    Args:
        chart: file to write.
        groups: cases by title.
        base: height of the figure in inches without groups.
        group: height of a group without cases.
        case: height of a case.
    """
    height = base + sum(group + case * len(cases) for cases in groups.values())
    ratios = {"height_ratios": [1 + len(cases) for cases in groups.values()]}
    with figure(chart, 9.6, height) as made:
        grid = made.subplots(len(groups), 2, squeeze=False, gridspec_kw=ratios)
        yield [(title, cases, *axes) for (title, cases), axes in zip(groups.items(), grid, strict=True)]


def note(axes: Axes, text: str, place: tuple[float, float], points: float, **style: Any) -> None:
    """Text to the right of a place."""
    axes.annotate(text, place, xytext=(points, 0), textcoords="offset points", va="center", **style)


def times_faster(
    axes: Axes, faster: dict[str, Any], place: float, color: str, points: float, marker: str = "o", label: Any = None
) -> None:
    """Range and median of how many times faster each round was."""
    most = max(faster["all"])
    axes.plot([min(faster["all"]), most], [place, place], color=color, linewidth=2)
    axes.plot([faster["median"]], [place], marker, color=color, markersize=6, label=label)
    note(axes, f"{faster['median']:.1f}x", (most, place), points, color=color, fontsize="small")


def finish_ratios(axes: Axes, labels: Sequence[str], title: str, margin: float) -> None:
    """Label the cases and draw the line at a ratio of 1."""
    axes.axvline(1, color=GREY, linewidth=1, linestyle=":", zorder=1)
    list_cases(axes, labels, title)
    axes.set_xlim(0, margin * axes.get_xlim()[1])


def list_cases(axes: Axes, labels: Sequence[str], title: str) -> None:
    """One case a line, the first at the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(title)
    axes.grid(axis="y", visible=False)
