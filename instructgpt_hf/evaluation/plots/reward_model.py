"""Picture of a reward model's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from instructgpt_hf.evaluation.plots.style import BLUE, GREEN, GREY, INK, ORANGE, name_rows, picture, write_above

# The model is blue and the length baseline grey in every panel; labels are green.
_MODEL: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 5.5, "linewidth": 1.8}
_LENGTH: dict[str, Any] = {"color": GREY, "marker": "s", "markersize": 4.5, "linewidth": 1.4, "linestyle": ":"}
_LABELS: dict[str, Any] = {"color": GREEN, "marker": "D", "markersize": 4.5, "linewidth": 1.4, "linestyle": "--"}
# Two series of a panel with columns: entry of each row, legend, style.
_ACCURACY = (("accuracy", "reward model", _MODEL), ("length_baseline_accuracy", "longer is better", _LENGTH))
_LONGER = (("longer_scores_higher", "by the reward model", _MODEL), ("longer_ranks_higher", "by the labels", _LABELS))


def draw_rankings(result: Mapping[str, Any], path: str | Path) -> Path:
    """Draw what `evaluate_rankings` measured: accuracy, calibration, score gaps and length, with 95 % intervals.

    Args:
        result: of `instructgpt_hf.evaluation.reward_model.evaluate.evaluate_rankings`, or the JSON written from it.
        path: the PNG to write; returned as a `Path`.
    """
    whole, by_k, by_gap = result["accuracy"], result["by_completions"], result["by_gap"]
    by_length = result["length"]["by_length_difference"]
    with picture(path, (12.6, 7.2), dpi=120, hspace=0.07, wspace=0.05) as figure:
        axes = [figure.add_subplot(2, 3, number + 1) for number in range(6)]
        axes[0].set(title="Accuracy by number of answers K", xlabel="K; below: number of pairs")
        _draw_columns(axes[0], by_k, [row["completions"] for row in by_k], _ACCURACY, "pairs ordered right")
        axes[1].set(title="Accuracy by rank gap", xlabel="difference in rank; below: number of pairs")
        _draw_columns(axes[1], by_gap, [row["gap"] for row in by_gap], _ACCURACY, "pairs ordered right")
        _draw_reliability(axes[2], result["calibration"])
        _draw_score_gaps(axes[3], result["score_gaps"])
        axes[4].set(title="The longer answer wins", xlabel="difference in tokens; below: number of pairs")
        ranges = [f"{row['low']}-{row['high']}" if row["low"] < row["high"] else row["low"] for row in by_length]
        _draw_columns(axes[4], by_length, ranges, _LONGER, "pairs of unequal length")
        _draw_coefficients(axes[5], result)
        title = (
            f"{_percent(whole, 'accuracy')} of {whole['pairs']:,} pairs of {whole['prompts']:,} held-out prompts are "
            f"ordered as labeled; by length alone {_percent(whole, 'length_baseline_accuracy')}"
        )
        figure.suptitle(title, x=0.01, ha="left")
    return Path(path)


def _percent(result: Mapping[str, Any], name: str) -> str:
    return f"{100 * result[name]:.1f} % ({100 * result[name + '_low']:.1f} to {100 * result[name + '_high']:.1f})"


def _draw_columns(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str | int],
    series: Sequence[tuple[str, str, dict[str, Any]]],
    label: str,
) -> None:
    """Draw two series with one column per row, above its name and number of pairs, and the line of guessing."""
    places = range(len(rows))
    if rows:
        for shift, (entry, legend, style) in zip((-0.08, 0.08), series, strict=True):
            _series(axes, [place + shift for place in places], rows, entry, legend, style)
    else:
        axes.text(0.5, 0.5, "no pair of unequal length", ha="center", color=GREY, transform=axes.transAxes)
    axes.axhline(0.5, color=GREY, linewidth=0.8, zorder=1)
    ticks = [f"{name}\n{_short(row['pairs'])}" for name, row in zip(names, rows, strict=True)]
    axes.set_xticks(places, ticks, fontsize=8.5)
    _percent_axis(axes, label, len(rows))


def _series(
    axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, label: str, style: dict[str, Any]
) -> None:
    """Draw a line through the values of `name`, with their intervals as error bars."""
    values, bars = [row[name] for row in rows], _error_bars(rows, name)
    axes.errorbar(x, values, yerr=bars, label=label, elinewidth=1.4, capsize=3, **style)


def _error_bars(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """[2, N]: distances of the values of `name` from the lower and from the upper ends of their intervals."""
    low = [max(0.0, row[name] - row[name + "_low"]) for row in rows]
    return [low, [max(0.0, row[name + "_high"] - row[name]) for row in rows]]


def _draw_reliability(axes: Axes, calibration: Mapping[str, Any]) -> None:
    rows = calibration["bins"]
    counts = axes.twinx()
    centers = [(row["low"] + row["high"]) / 2 for row in rows]
    width = 0.8 * min(row["high"] - row["low"] for row in rows)
    bars = counts.bar(centers, [row["pairs"] for row in rows], width=width, color=GREY, alpha=0.25)
    counts.bar_label(bars, [_short(row["pairs"]) for row in rows], fontsize=7, color=GREY, padding=1)
    # The bars take the lower quarter, below the curve of any model that is better than guessing.
    counts.set_ylim(0, 5 * max(row["pairs"] for row in rows))
    counts.axis("off")
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1.0, linestyle="--", label="calibrated")
    _series(axes, [row["confidence"] for row in rows], rows, "accuracy", "reward model", _MODEL)
    _percent_axis(axes, "pairs ordered right", lowest=0)
    axes.set_xlim(0.49, 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    title = f"Reliability: ECE {100 * calibration['ece']:.1f} %"
    axes.set(title=title, xlabel="probability the model gives its order; bars: pairs")


def _draw_score_gaps(axes: Axes, gaps: Mapping[str, Any]) -> None:
    edges = gaps["edges"]
    for name, color, style in (("right", BLUE, "-"), ("wrong", ORANGE, "--")):
        axes.stairs(gaps[name], edges, fill=True, color=color, alpha=0.25)
        label = f"ordered {name} ({sum(gaps[name]):,})"
        axes.stairs(gaps[name], edges, color=color, linewidth=1.6, linestyle=style, label=label)
    axes.set_xlim(0, edges[-1])
    axes.set(title="Score gaps", xlabel="difference of the two scores; last bin: and more", ylabel="pairs")
    axes.set_ylim(0, 1.25 * max(1, *gaps["right"], *gaps["wrong"]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right")


def _draw_coefficients(axes: Axes, result: Mapping[str, Any]) -> None:
    """Draw Kendall's tau and the correlations with length as dots with intervals on one scale."""
    tau, length = result["kendall_tau"], result["length"]
    lines: list[tuple[str, Mapping[str, Any], str, dict[str, Any]]] = [
        ("Kendall's tau\nscore, rank", tau, "kendall_tau", _MODEL),
        ("Kendall's tau\nlength, rank", tau, "length_baseline_kendall_tau", _LENGTH),
        ("Spearman's rho\nscore, length", length, "score_length_correlation", _MODEL),
        ("Spearman's rho\nrank, length", length, "rank_length_correlation", _LABELS),
    ]
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    for place, (_, part, name, style) in enumerate(lines):
        if part[name] is None:
            axes.annotate("length or score does not vary", (0, place), ha="center", va="center", color=GREY)
            continue
        look = {key: value for key, value in style.items() if key not in ("linestyle", "linewidth")}
        ends = _error_bars([part], name)
        axes.errorbar([part[name]], [place], xerr=ends, elinewidth=1.8, capsize=4, linestyle="none", **look)
        # Adding 0.0 turns -0.0 into 0.0.
        write_above(axes, f"{part[name] + 0.0:.2f}", (part[name], place), style["color"], 7)
    name_rows(axes, [line[0] for line in lines], room=0.6)
    axes.set_xlim(-1.05, 1.05)
    axes.set(title="Order and length within a prompt", xlabel="mean over prompts, better is higher")


def _percent_axis(axes: Axes, label: str, places: int = 0, lowest: int | None = None) -> None:
    """Format the y axis of finished axes as a share up to 100 %, with room for the legend above.

    `places` columns on the x axis have room for at least three; 0 leaves it as it is. The y axis begins at `lowest`
    percent, by default the highest of 0, 20 and 40 below all points.
    """
    if lowest is None:
        lowest = next((percent for percent in (40, 20) if axes.dataLim.y0 > percent / 100), 0)
    ticks = range(lowest, 101, 10 if lowest == 40 else 20)
    axes.set_ylim(lowest / 100, 1.18)
    axes.set_yticks([tick / 100 for tick in ticks])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    if places:
        margin = 0.6 + max(0, 3 - places) / 2
        axes.set_xlim(-margin, places - 1 + margin)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", ncols=2, columnspacing=1.2, handlelength=2.0)


def _short(count: int) -> str:
    """`count` in at most four characters: 999, 1.2k, 12k."""
    return str(count) if count < 1000 else f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:,.0f}k"
