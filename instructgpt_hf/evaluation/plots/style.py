"""Colours, matplotlib settings and the parts that several pictures share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito's palette, distinct for every common colour blindness; lines also differ in style.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
INK, FAINT = "#222222", "#E3E3E3"
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


@contextmanager
def picture(path: str | Path, size: tuple[float, float], dpi: int, **spacing: Any) -> Iterator[Figure]:
    """A figure of `size` in inches, written to `path` at the end of the block; no global state changes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(**spacing))
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, dpi=dpi)


def name_rows(axes: Axes, names: Sequence[str], room: float) -> None:
    """Write a name beside each row, the first at the top with `room` above it."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -room)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def write_above(axes: Axes, text: str, point: tuple[float, float], color: str, distance: float) -> None:
    """Write a value above its point, at a distance in points."""
    place: dict[str, Any] = {"xytext": (0, distance), "textcoords": "offset points", "ha": "center"}
    axes.annotate(text, point, color=color, fontweight="bold", **place)
