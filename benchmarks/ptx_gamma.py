"""Which gamma does PPO-ptx need? (InstructGPT, equation 2 and E.6)

    instructgpt-hf sft --config tiny-cpu; instructgpt-hf reward --config tiny-cpu
    python benchmarks/ptx_gamma.py --run runs/tiny-cpu                      # the lab, token means
    python benchmarks/ptx_gamma.py --reductions sum/sum --gammas 27.8       # adds to the same result file
    python benchmarks/ptx_gamma.py --model SMOLLM2 --prompts prompts.jsonl --text pretraining.jsonl --gammas 0 1 27.8
    python benchmarks/ptx_gamma.py --draw

The paper sets gamma = 27.8 and does not say how it reduces its two losses, what its policy's learning rate is, or
whether advantages are whitened. Each run trains the same policy by this package's trainer with one combination of them
from one seed, and is measured on held-out prompts and held-out pretraining text. A call runs every combination of its
arguments that the result file does not hold yet.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from common.memory import BenchmarkError
from common.report import BLUE, GREEN, GREY, INK, ORANGE, Run, figure, interval, legend_below, markdown
from common.results import header, mean_interval, read_runs, rounded, write_run
from common.script import command_line, device_name, measure_or_draw, start
from common.training import training_settings
from matplotlib.axes import Axes
from setups.ptx_gamma import Bench, FileBench, LabBench
from transformers import PrinterCallback

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

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
REDUCTIONS = {"mean": "token_mean", "sum": "sequence_sum"}
# Logged in every iteration; averaged over the last quarter of them.
LOGGED = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "policy/approx_kl",
    "policy/clip_fraction",
    "grad_norm",
    "grad_norm_ratio_ptx",
    "grad_cosine_ptx",
    "loss/ptx",
)
CURVES = ("objective/scores", "objective/kl", "grad_norm_ratio_ptx")


@dataclass(frozen=True)
class Arm:
    """One combination; `reductions` is policy/pretraining, each `mean` or `sum`."""

    reductions: str
    gamma: float
    learning_rate: float
    whiten: bool
    seed: int


def train(arm: Arm, bench: Bench, iterations: int) -> dict[str, Any]:
    """Train one arm and measure its policy."""
    reward, value_model = bench.reward_and_value(arm.seed)
    policy = bench.policy()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            policy,
            reward,
            make_config(arm, bench, iterations, folder),
            value_model=value_model,
            train_dataset=bench.prompts,
            processing_class=bench.tokenizer,
            prompt_format=bench.format,
            pretraining_dataset=bench.texts if arm.gamma else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    records = [record for record in trainer.state.log_history if "objective/scores" in record]
    last = records[-max(1, len(records) // 4) :]
    return {
        "curve": {name: [record[name] for record in records] for name in CURVES if name in records[0]},
        "logged": {name: statistics.fmean(record[name] for record in last) for name in LOGGED if name in records[0]},
        "measured": bench.measure(policy),
    }


def make_config(arm: Arm, bench: Bench, iterations: int, folder: str) -> PPOConfig:
    """The bench's settings with those of one arm."""
    policy_reduction, ptx_reduction = (REDUCTIONS[name] for name in arm.reductions.split("/"))
    settings = {
        **training_settings(folder, device_name() == "cuda"),
        **bench.settings,
        "gradient_accumulation_steps": 1,
        "total_episodes": iterations * bench.settings["generation_batch_size"],
        "policy_loss_reduction": policy_reduction,
        "ptx_loss_reduction": ptx_reduction,
        "ptx_coef": arm.gamma,
        "learning_rate": arm.learning_rate,
        "whiten_advantages": arm.whiten,
        "ema_decay": 0.0,
        "seed": arm.seed,
        "bf16": False,
    }
    return PPOConfig(**settings)


def summarise(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and 95 % intervals over seeds of every combination."""
    names = ("reductions", "whiten", "learning_rate", "gamma")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault(tuple(point[name] for name in names), []).append(point)
    summary = []
    for key, same in sorted(groups.items()):
        values = [{**point["measured"], **point["logged"]} for point in same]
        intervals = {name: mean_interval([value[name] for value in values]) for name in values[0]}
        seeds = sorted(point["seed"] for point in same)
        summary.append({**dict(zip(names, key, strict=True)), "seeds": seeds, **intervals})
    return summary


def measure(options: argparse.Namespace, path: Path) -> None:
    """Run every combination that is missing; `path` has the finished ones after each."""
    bench = make_bench(options)
    run = make_run(options, bench, read_runs(path))
    print(f"{bench.label}, before PPO: {run['start']}", flush=True)
    done = {tuple(point[name] for name in Arm.__dataclass_fields__) for point in run["points"]}
    rates = options.learning_rates or [bench.settings["learning_rate"]]
    for seed, rate, names, gamma in itertools.product(options.seeds, rates, options.reductions, options.gammas):
        arm = Arm(names, gamma, rate, not options.raw_advantages, seed)
        if astuple(arm) in done:
            continue
        started = time.perf_counter()
        results = train(arm, bench, options.iterations)
        gc.collect()
        run["points"].append(rounded({**asdict(arm), **results, "seconds": time.perf_counter() - started}))
        run["summary"] = summarise(run["points"])
        write_run(path, run, same=("bench", "settings"))
        print(f"{arm}: {run['points'][-1]['measured']}", flush=True)


def make_run(options: argparse.Namespace, bench: Bench, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's settings, with the points of an earlier run with the same bench and settings."""
    head = header()
    commands = [head.pop("command")]
    run: dict[str, Any] = {
        **head,
        "commands": commands,
        "bench": bench.label,
        "settings": {**bench.settings, "iterations": options.iterations, "held_out": options.held_out},
        "points": [],
    }
    for known in earlier:
        if all(known[name] == run[name] for name in ("bench", "settings")):
            commands = list(dict.fromkeys([*known["commands"], *commands]))
            return {**run, "points": known["points"], "start": known["start"], "commands": commands}
    return {**run, "start": bench.measure(bench.policy())}


def make_bench(options: argparse.Namespace) -> Bench:
    """Models, prompts and text of the command line.

    Raises:
        BenchmarkError: if a model folder comes without prompts or text.
    """
    if options.model is None:
        return LabBench(options.run, options.held_out)
    if not (options.prompts and options.text):
        raise BenchmarkError("--model needs --prompts and --text")
    return FileBench(options.model, options.prompts, options.text, options.held_out, options.value_layers)


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "ptx_gamma_<bench>")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny-cpu"), help="finished tiny-cpu run, for the lab")
    parser.add_argument("--model", type=Path, help="model folder, instead of the lab; with --prompts and --text")
    parser.add_argument("--prompts", type=Path, help="file with the column prompt")
    parser.add_argument("--text", type=Path, help="file with the column text")
    parser.add_argument("--value_layers", type=int, help="first layers of the model that make its value model; all")
    parser.add_argument(
        "--reductions",
        nargs="+",
        default=["mean/mean"],
        choices=["/".join(pair) for pair in itertools.product(REDUCTIONS, repeat=2)],
        help="policy/pretraining: mean over tokens, or sum over a sequence and mean over sequences",
    )
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.0, 1.0, 5.0, 27.8, 100.0])
    parser.add_argument("--learning_rates", type=float, nargs="+", help="of the policy; the bench's own by default")
    parser.add_argument("--raw_advantages", action="store_true", help="do not whiten them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--held_out", type=int, default=200, help="prompts (and, from files, documents) to measure on")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    measure_or_draw(options, f"ptx_gamma_{options.model.name if options.model else 'lab'}", measure, draw, table)


if __name__ == "__main__":
    start(main)
