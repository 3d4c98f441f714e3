"""What benchmarks/ptx_gamma.py prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from common import BenchmarkError

from instructgpt_hf.evaluation.style import BLUE, GREEN, GREY, INK, ORANGE

NAMES = {"mean": "token mean", "sum": "sequence sum"}
_COLORS = (BLUE, ORANGE, GREEN, GREY, INK)
_MARKERS = "osD^v"
# Measures of the table with their digits; a bench has those that its start has, and the last two come from the log.
_COLUMNS = {
    "reward": ("reward", 2),
    "gold_score": ("gold score", 2),
    "kl": ("KL, nats per answer", 1),
    "text_loss": ("loss on text", 3),
    "task_accuracy": ("task accuracy", 3),
    "grad_norm_ratio_ptx": ("gradient ratio", 2),
}


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


def in_token_means(entry: dict[str, Any], run: dict[str, Any]) -> float:
    """The gamma with which token means weigh the two gradients as this entry does, at the start's answer length."""
    policy, text = entry["reductions"].split("/")
    answer = run["start"]["mean_length"] if policy == "sum" else 1.0
    example = run["settings"]["ptx_max_length"] - 1 if text == "sum" else 1
    return float(entry["gamma"] * example / answer)


def table(path: Path) -> str:
    """A result file as the table of the documentation: means over seeds with 95 % intervals."""
    lines = []
    for run in common.read_runs(path):
        names = [name for name in _COLUMNS if name in run["start"]]
        columns = [*names, "grad_norm_ratio_ptx"]
        lines += [
            "| policy / pretraining reduction | advantages | learning rate | γ | γ in token means | seeds | "
            + " | ".join(_COLUMNS[name][0] for name in columns)
            + " |",
            "|---" * (6 + len(columns)) + "|",
            "| before PPO | | | | | | "
            + " | ".join(f"{run['start'][name]:.{_COLUMNS[name][1]}f}" for name in names)
            + " | |",
        ]
        for entry in run["summary"]:
            values = " | ".join(_interval(entry.get(name), _COLUMNS[name][1], len(entry["seeds"])) for name in columns)
            lines.append(
                f"| {reductions(entry)} | {advantages(entry)} | {entry['learning_rate']:g} | {entry['gamma']:g} "
                f"| {in_token_means(entry, run):.3g} | {len(entry['seeds'])} | {values} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _interval(item: dict[str, float] | None, digits: int, seeds: int) -> str:
    if item is None:
        return ""
    ends = f" ({item['low']:.{digits}f} to {item['high']:.{digits}f})" if seeds > 1 else ""
    return f"{item['mean']:.{digits}f}{ends}"


def draw(path: Path) -> Path:
    """Picture of the last run of a result file, beside it.

    Left the trade: reward against loss on held-out text, one curve for each pair of reductions, points labelled with
    gamma. Right, if there are several learning rates, what they do at each gamma.
    """
    runs = common.read_runs(path)
    if not runs:
        raise BenchmarkError(f"{path}: nothing has been measured yet")
    run, chart = runs[-1], path.with_suffix(".png")
    measure = "gold_score" if "gold_score" in run["start"] else "reward"
    rate = run["settings"]["learning_rate"]
    swept = [entry for entry in run["summary"] if entry["reductions"] == "mean/mean" and entry["whiten"]]
    several = len({entry["learning_rate"] for entry in swept}) > 1
    with common.figure(chart, 12.6 if several else 6.3, 4.4) as figure:
        panels = figure.subplots(1, 3 if several else 1, squeeze=False)[0]
        _draw_trade(panels[0], run, [entry for entry in run["summary"] if entry["learning_rate"] == rate], measure)
        if several:
            for axes, name in zip(panels[1:], (measure, "text_loss"), strict=True):
                _draw_rates(axes, swept, name, run["start"][name])
    return chart


def _draw_trade(axes: Any, run: dict[str, Any], entries: list[dict[str, Any]], measure: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        name = reductions(entry) + ("" if entry["whiten"] else ", raw advantages")
        groups.setdefault(name, []).append(entry)
    for number, (name, group) in enumerate(groups.items()):
        group.sort(key=lambda entry: entry["gamma"])
        color, marker = _COLORS[number % 5], _MARKERS[number % 5]
        x, y = ([entry[key] for entry in group] for key in ("text_loss", measure))
        axes.errorbar(
            [item["mean"] for item in x],
            [item["mean"] for item in y],
            xerr=[[item["mean"] - item["low"] for item in x], [item["high"] - item["mean"] for item in x]],
            yerr=[[item["mean"] - item["low"] for item in y], [item["high"] - item["mean"] for item in y]],
            color=color,
            marker=marker,
            markersize=5,
            elinewidth=0.6,
            linewidth=1.4,
            label=name,
        )
        for entry in group:
            place = (entry["text_loss"]["mean"], entry[measure]["mean"])
            axes.annotate(
                f"{entry['gamma']:g}", place, xytext=(4, 4), textcoords="offset points", color=color, fontsize=8
            )
    axes.plot(run["start"]["text_loss"], run["start"][measure], "*", color=INK, markersize=10, label="before PPO")
    axes.set_title("Reward against forgetting, by γ")
    axes.set_xlabel("loss on held-out text, nats per token")
    axes.set_ylabel(measure.replace("_", " "))
    axes.legend(fontsize=8)


def _draw_rates(axes: Any, entries: list[dict[str, Any]], name: str, start: float) -> None:
    for number, gamma in enumerate(sorted({entry["gamma"] for entry in entries})):
        line = sorted((e for e in entries if e["gamma"] == gamma), key=lambda entry: entry["learning_rate"])
        if len(line) < 2:
            continue
        rates, items = [entry["learning_rate"] for entry in line], [entry[name] for entry in line]
        axes.errorbar(
            rates,
            [item["mean"] for item in items],
            yerr=[
                [item["mean"] - item["low"] for item in items],
                [item["high"] - item["mean"] for item in items],
            ],
            color=_COLORS[number % 5],
            marker=_MARKERS[number % 5],
            markersize=5,
            elinewidth=0.6,
            linewidth=1.4,
            label=f"γ = {gamma:g}",
        )
    axes.axhline(start, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.set_xscale("log")
    axes.set_title("Loss on text" if name == "text_loss" else name.replace("_", " ").capitalize())
    axes.set_xlabel("learning rate of the policy (token means)")
    axes.legend(fontsize=8)
