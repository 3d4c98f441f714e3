"""What benchmarks/ptx_gamma.py prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common

from instructgpt_hf.evaluation.plots.style import BLUE, GREEN, GREY, INK, ORANGE

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
        for entry in sorted(run["summary"], key=lambda entry: _order(entry, run)):
            values = " | ".join(_interval(entry.get(name), _COLUMNS[name][1], len(entry["seeds"])) for name in columns)
            lines.append(
                f"| {reductions(entry)} | {advantages(entry)} | {entry['learning_rate']:g} | {entry['gamma']:g} "
                f"| {in_token_means(entry, run):.3g} | {len(entry['seeds'])} | {values} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _order(entry: dict[str, Any], run: dict[str, Any]) -> tuple[Any, ...]:
    return entry["learning_rate"], not entry["whiten"], in_token_means(entry, run), entry["reductions"]


def _interval(item: dict[str, float] | None, digits: int, seeds: int) -> str:
    if item is None:
        return ""
    ends = f" ({item['low']:.{digits}f} to {item['high']:.{digits}f})" if seeds > 1 else ""
    return f"{item['mean']:.{digits}f}{ends}"


def draw(path: Path) -> Path:
    """Picture of the last run of a result file, beside it.

    The trade: reward against loss on held-out text, one curve for each pair of reductions, points labelled with gamma;
    the same rewards against the ratio of the two gradients; and, if there are several learning rates, the loss on text
    at each of them.
    """
    runs = common.measured_runs(path)
    run, chart = runs[-1], path.with_suffix(".png")
    whitened = [entry for entry in run["summary"] if entry["whiten"]]
    swept = [entry for entry in whitened if entry["reductions"] == "mean/mean"]
    several = len({entry["learning_rate"] for entry in swept}) > 1
    with common.figure(chart, 12.6 if several else 8.4, 4.2) as figure:
        panels = figure.subplots(1, 3 if several else 2)
        same_rate = [entry for entry in whitened if entry["learning_rate"] == run["settings"]["learning_rate"]]
        _draw_rewards(panels[0], run, same_rate, "text_loss")
        _draw_rewards(panels[1], run, same_rate, "grad_norm_ratio_ptx")
        if several:
            _draw_rates(panels[2], run, swept)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
    return chart


def _draw_rewards(axes: Any, run: dict[str, Any], entries: list[dict[str, Any]], measure: str) -> None:
    for number, names in enumerate(sorted({entry["reductions"] for entry in entries})):
        group = [entry for entry in entries if entry["reductions"] == names and measure in entry]
        group.sort(key=lambda entry: entry["gamma"])
        color = _COLORS[number]
        _line(axes, [entry[measure]["mean"] for entry in group], [entry["reward"] for entry in group], number)
        axes.lines[-1].set_label(reductions(group[0]))
        for entry in group:
            place = (entry[measure]["mean"], entry["reward"]["mean"])
            text = f"γ {entry['gamma']:g}"
            axes.annotate(text, place, xytext=(5, 4), textcoords="offset points", color=color, fontsize=8)
    start = run["start"]["reward"]
    if measure == "text_loss":
        axes.plot(run["start"][measure], start, "*", color=INK, markersize=10, label="before PPO", linestyle="none")
        axes.set_title("Reward against forgetting")
        axes.set_xlabel("loss on held-out text, nats per token")
    else:
        axes.axhline(start, color=GREY, linewidth=1, linestyle=":", zorder=1)
        axes.set_xscale("log")
        axes.set_title("Reward by gradient ratio")
        axes.set_xlabel("grad_norm_ratio_ptx")
    axes.set_ylabel("reward of held-out answers")


def _draw_rates(axes: Any, run: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    lines = {
        gamma: sorted((e for e in entries if e["gamma"] == gamma), key=lambda entry: entry["learning_rate"])
        for gamma in sorted({entry["gamma"] for entry in entries})
    }
    for number, (gamma, line) in enumerate((gamma, line) for gamma, line in lines.items() if len(line) > 1):
        _line(axes, [entry["learning_rate"] for entry in line], [entry["text_loss"] for entry in line], number)
        axes.lines[-1].set_label(f"γ = {gamma:g}, token means")
    axes.axhline(run["start"]["text_loss"], color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    rates = sorted({entry["learning_rate"] for entry in entries})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yticks([], minor=True)
    axes.set_title("Forgetting by learning rate")
    axes.set_xlabel("learning rate of the policy")
    axes.set_ylabel("loss on held-out text, nats per token")
    axes.legend()


def _line(axes: Any, places: list[float], items: list[dict[str, float]], number: int) -> None:
    """Means over `places` joined by a line, with faint 95 % intervals."""
    means = [item["mean"] for item in items]
    below = [item["mean"] - item["low"] for item in items]
    above = [item["high"] - item["mean"] for item in items]
    color = _COLORS[number % 5]
    axes.errorbar(places, means, yerr=[below, above], fmt="none", ecolor=color, elinewidth=1, alpha=0.35)
    axes.plot(places, means, color=color, marker=_MARKERS[number % 5], markersize=5, linewidth=1.6)
