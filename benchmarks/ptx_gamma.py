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
from common.results import header, mean_interval, read_runs, rounded, write_run
from common.script import command_line, device_name, measure_or_draw, start
from common.training import training_settings
from reports import ptx_gamma as report
from setups.ptx_gamma import Bench, FileBench, LabBench
from transformers import PrinterCallback

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

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
            value_model,
            make_config(arm, bench, iterations, folder),
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
        print(report.describe(run["points"][-1]), flush=True)


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
    measure_or_draw(options, f"ptx_gamma_{options.model.name if options.model else 'lab'}", measure, report)


if __name__ == "__main__":
    start(main)
