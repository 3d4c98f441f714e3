"""Picture of the training curves of all stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from instructgpt_hf.evaluation.plots.style import BLUE, GREY, ORANGE, picture
from instructgpt_hf.metric_register import METRICS, Metric

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
# Stage of a policy -> legend, color, line style; both policies share their panels.
_POLICY_STYLE = {"ppo": ("PPO", BLUE, "--"), "ppo-ptx": ("PPO-ptx", ORANGE, "-")}
# `Metric.line` -> color, line style, marker.
_LINE_STYLE = {"training": (BLUE, "-", ""), "held out": (ORANGE, "-", "o"), "length alone": (GREY, ":", "s")}
# With more points than this, the raw line is faint and a running mean is drawn over it.
_SMOOTH_FROM = 40


class _Line(NamedTuple):
    """Finite points of one metric of one stage, and the label of its x axis."""

    x: list[float]
    y: list[float]
    label: str


class _Panel(NamedTuple):
    """One panel; the metrics in it name its title as `Metric.panel`.

    With `lowest`, the y axis ends at 1 and begins there at the lowest: early values far below would flatten the curve.
    """

    title: str
    unit: str
    percent: bool = False
    zero_line: bool = False
    lowest: float | None = None

    @property
    def lines(self) -> list[tuple[str, Metric]]:
        """Stage and metric of each line."""
        return [(stage, metric) for metric in METRICS if metric.panel == self.title for stage in metric.stages]


_PANELS = (
    _Panel("SFT: loss", "nats per token"),
    _Panel("Reward model: loss", "nats per pair"),
    _Panel("Reward model: accuracy", "pairs ordered right", percent=True),
    _Panel("Reward of the answers", "reward model score"),
    _Panel("KL to the SFT model", "nats per answer", zero_line=True),
    _Panel("Entropy of the policy", "nats per token"),
    _Panel("Value model: explained variance", "share of the returns' variance", zero_line=True, lowest=-1.0),
    _Panel("Clipped tokens", "share", percent=True),
    _Panel("Pretraining loss", "nats per token"),
    _Panel("Pretraining gradient", "length over that of PPO's"),
    _Panel("Length of the answers", "tokens"),
    _Panel("Answers that end", "share with EOS", percent=True),
)


def draw_training_curves(curves: Curves, path: str | Path) -> Path:
    """Draw the curves of all stages, one panel per quantity, both policies in the same panels.

    Args:
        curves: log histories by stage; `sft`, `reward`, `ppo`, `ppo-ptx`.
        path: the PNG to write; returned as a `Path`.
    """
    panels = [
        panel for panel in _PANELS if any(_line(curves, stage, metric.logged).x for stage, metric in panel.lines)
    ]
    columns = min(3, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    with picture(path, (4.2 * columns, 2.9 * lines + 0.3), dpi=160, hspace=0.06, wspace=0.05) as figure:
        for number, panel in enumerate(panels, 1):
            _draw_panel(figure.add_subplot(lines, columns, number), panel, curves)
    return Path(path)


def _draw_panel(axes: Axes, panel: _Panel, curves: Curves) -> None:
    axes.set(title=panel.title, ylabel=panel.unit)
    for stage, metric in panel.lines:
        x, y, label = _line(curves, stage, metric.logged)
        if not x:
            continue
        axes.set_xlabel(label)
        if stage in _POLICY_STYLE:
            _plot(axes, x, y, *_POLICY_STYLE[stage])
            continue
        color, style, marker = _LINE_STYLE[metric.line]
        _plot(axes, x, y, metric.line, color, style, marker)
        low, high = (_line(curves, stage, metric.logged + end) for end in ("_low", "_high"))
        if low.x == high.x == x:
            axes.fill_between(x, low.y, high.y, color=color, alpha=0.12, linewidth=0)
    if panel.zero_line:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if panel.lowest is not None:
        axes.set_ylim(max(panel.lowest, axes.get_ylim()[0]), 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="best", handlelength=2.2)


def _plot(axes: Axes, x: list[float], y: list[float], text: str, color: str, style: str, marker: str = "") -> None:
    line: dict[str, Any] = {"color": color, "linestyle": style, "solid_capstyle": "round"}
    if marker or len(x) <= _SMOOTH_FROM:
        marker = marker or ("o" if len(x) == 1 else "")
        axes.plot(x, y, label=text, linewidth=1.8, marker=marker, markersize=4 if marker else 0, **line)
        return
    axes.plot(x, y, linewidth=0.8, alpha=0.3, color=color)
    axes.plot(x, _running_mean(y), label=text, linewidth=2.0, **line)


def _running_mean(values: list[float]) -> np.ndarray:
    """Running mean over a twelfth of the points; at the ends over fewer."""
    half = max(1, len(values) // 24)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    means: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return means


def _line(curves: Curves, stage: str, key: str) -> _Line:
    records = [record for record in curves.get(stage) or () if _is_finite(record.get(key))]
    axis = "iteration" if records and all("iteration" in record for record in records) else "step"
    x = [float(record.get(axis, place + 1)) for place, record in enumerate(records)]
    return _Line(x, [float(record[key]) for record in records], axis if axis == "iteration" else "optimizer step")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
