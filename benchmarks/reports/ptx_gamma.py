"""Printed summary, table and picture of benchmarks/ptx_gamma.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.report import BLUE, GREEN, GREY, INK, ORANGE, Run, figure, interval, legend_below, markdown
from matplotlib.axes import Axes

NAMES = {"mean": "token mean", "sum": "sequence sum"}
_COLORS = (BLUE, ORANGE, GREEN, GREY, INK)
_MARKERS = "osD^v"
# Titles and digits of the measures. A table has those that were measured before PPO, then the gradient ratio, which is
# from the log.
_RATIO = "grad_norm_ratio_ptx"
_COLUMNS = {
    "reward": ("reward", 2),
    "gold_score": ("gold score", 2),
    "kl": ("KL, nats per answer", 1),
    "text_loss": ("loss on text", 3),
    "task_accuracy": ("task accuracy", 3),
    _RATIO: ("gradient ratio", 2),
}
_TEXT_LOSS_LABEL = "loss on held-out text, nats per token"


def describe(point: dict[str, Any]) -> str:
    """One run in one line."""
    values = {**point["measured"], **point["logged"]}
    shown = ", ".join(f"{title} {values[name]:.3f}" for name, (title, _) in _COLUMNS.items() if name in values)
    return (
        f"seed {point['seed']}, {reductions(point)}, {advantages(point)}, learning rate {point['learning_rate']:g}, "
        f"gamma {point['gamma']:g}: {shown}; {point['seconds']:.0f} s"
    )


def reductions(entry: dict[str, Any]) -> str:
    """Policy and pretraining reduction in words."""
    policy, text = (NAMES[name] for name in entry["reductions"].split("/"))
    return f"{policy}s" if policy == text else f"{policy} / {text}"


def advantages(entry: dict[str, Any]) -> str:
    """Whether advantages were whitened, in words."""
    return "whitened" if entry["whiten"] else "raw"


def in_token_means(entry: dict[str, Any], run: Run) -> float:
    """The gamma with which token means weigh the two gradients as this entry does, for the lengths before PPO."""
    policy, text = entry["reductions"].split("/")
    completion = run["start"]["mean_length"] if policy == "sum" else 1.0
    example = run["settings"]["ptx_max_length"] - 1 if text == "sum" else 1
    return float(entry["gamma"] * example / completion)


def table(runs: list[Run]) -> str:
    """A table for every run: means over seeds with 95 % intervals."""
    return "\n\n".join(map(_run_table, runs))


def _run_table(run: Run) -> str:
    start = run["start"]
    names = [name for name in _COLUMNS if name in start or name == _RATIO]
    titles = ["policy / pretraining reduction", "advantages", "learning rate", "γ", "γ in token means", "seeds"]
    before = [f"{start[name]:.{_COLUMNS[name][1]}f}" if name in start else None for name in names]
    rows: list[list[str | None]] = [["before PPO", *[None] * 5, *before]]
    for entry in sorted(run["summary"], key=lambda entry: _order(entry, run)):
        rate, gamma, equivalent = entry["learning_rate"], entry["gamma"], in_token_means(entry, run)
        settings = [reductions(entry), advantages(entry), f"{rate:g}", f"{gamma:g}", f"{equivalent:.3g}"]
        rows.append([*settings, f"{len(entry['seeds'])}", *(_measure(entry, name) for name in names)])
    return markdown([*titles, *(_COLUMNS[name][0] for name in names)], rows)


def _order(entry: dict[str, Any], run: Run) -> tuple[Any, ...]:
    return entry["learning_rate"], not entry["whiten"], in_token_means(entry, run), entry["reductions"]


def _measure(entry: dict[str, Any], name: str) -> str:
    """A mean over seeds, with its interval if there are several seeds; empty if it was not logged."""
    if name not in entry:
        return ""
    form = f".{_COLUMNS[name][1]}f"
    return interval(entry[name], form) if len(entry["seeds"]) > 1 else format(entry[name]["mean"], form)


def draw(runs: list[Run], chart: Path) -> None:
    """The trade-off of the last run between reward and loss on text.

    Reward against loss on held-out text, one curve for each pair of reductions, points labelled with gamma; the same
    rewards against the ratio of the two gradients; with several learning rates also the loss on text at each of them.
    """
    run = runs[-1]
    whitened = [entry for entry in run["summary"] if entry["whiten"]]
    same_rate = [entry for entry in whitened if entry["learning_rate"] == run["settings"]["learning_rate"]]
    swept = [entry for entry in whitened if entry["reductions"] == "mean/mean"]
    several = len({entry["learning_rate"] for entry in swept}) > 1
    with figure(chart, 12.6 if several else 8.4, 4.2) as made:
        panels = made.subplots(1, 3 if several else 2)
        _draw_rewards(panels[0], same_rate, "text_loss")
        _draw_start(panels[0], run["start"])
        _draw_rewards(panels[1], same_rate, _RATIO)
        panels[1].axhline(run["start"]["reward"], color=GREY, linewidth=1, linestyle=":", zorder=1)
        panels[1].set(xscale="log", title="Reward by gradient ratio", xlabel=_RATIO)
        if several:
            _draw_rates(panels[2], run["start"]["text_loss"], swept)
        legend_below(made, panels[0], "left", columns=4)


def _draw_rewards(axes: Axes, entries: list[dict[str, Any]], measure: str) -> None:
    for number, names in enumerate(sorted({entry["reductions"] for entry in entries})):
        group = [entry for entry in entries if entry["reductions"] == names and measure in entry]
        group.sort(key=lambda entry: entry["gamma"])
        places = [entry[measure]["mean"] for entry in group]
        _line(axes, places, [entry["reward"] for entry in group], number, reductions(group[0]))
        style = dict(textcoords="offset points", color=_COLORS[number], fontsize=8)
        for entry, place in zip(group, places, strict=True):
            axes.annotate(f"γ {entry['gamma']:g}", (place, entry["reward"]["mean"]), xytext=(5, 4), **style)
    axes.set_ylabel("reward of held-out answers")


def _draw_start(axes: Axes, start: dict[str, float]) -> None:
    place = start["text_loss"], start["reward"]
    axes.plot(*place, "*", color=INK, markersize=10, label="before PPO", linestyle="none")
    axes.set(title="Reward against forgetting", xlabel=_TEXT_LOSS_LABEL)


def _draw_rates(axes: Axes, start: float, entries: list[dict[str, Any]]) -> None:
    number = 0
    for gamma in sorted({entry["gamma"] for entry in entries}):
        line = sorted((e for e in entries if e["gamma"] == gamma), key=lambda entry: entry["learning_rate"])
        if len(line) > 1:
            places = [entry["learning_rate"] for entry in line]
            _line(axes, places, [entry["text_loss"] for entry in line], number, f"γ = {gamma:g}, token means")
            number += 1
    axes.axhline(start, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.set(xscale="log", yscale="log")
    rates = sorted({entry["learning_rate"] for entry in entries})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yticks([], minor=True)
    axes.set(title="Forgetting by learning rate", xlabel="learning rate of the policy", ylabel=_TEXT_LOSS_LABEL)
    axes.legend()


def _line(axes: Axes, places: list[float], items: list[dict[str, float]], number: int, label: str) -> None:
    """Means joined by a line, with faint 95 % intervals."""
    means = [item["mean"] for item in items]
    reach = [[item["mean"] - item["low"] for item in items], [item["high"] - item["mean"] for item in items]]
    color, marker = _COLORS[number % 5], _MARKERS[number % 5]
    axes.errorbar(places, means, yerr=reach, fmt="none", ecolor=color, elinewidth=1, alpha=0.35)
    axes.plot(places, means, color=color, marker=marker, markersize=5, linewidth=1.6, label=label)
