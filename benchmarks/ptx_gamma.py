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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
from common import BenchmarkError
from ptx_gamma_bench import Bench, FileBench, LabBench
from ptx_gamma_report import describe, draw, table
from transformers import PrinterCallback

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

REDUCTIONS = {"mean": "token_mean", "sum": "sequence_sum"}
# What the trainer logs in every iteration, averaged over the last quarter of them.
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
    policy_reduction, ptx_reduction = (REDUCTIONS[name] for name in arm.reductions.split("/"))
    reward, value_model = bench.reward_and_value(arm.seed)
    policy = bench.policy()
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            **{
                **bench.settings,
                "output_dir": folder,
                "gradient_accumulation_steps": 1,
                "total_episodes": iterations * bench.settings["generation_batch_size"],
                "policy_loss_reduction": policy_reduction,
                "ptx_loss_reduction": ptx_reduction,
                "ptx_coef": arm.gamma,
                "learning_rate": arm.learning_rate,
                "whiten_advantages": arm.whiten,
                "ema_decay": 0.0,
                "seed": arm.seed,
                "use_cpu": common.device_name() == "cpu",
                "bf16": False,
                "save_strategy": "no",
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
            }
        )
        trainer = PPOTrainer(
            policy,
            reward,
            value_model,
            args,
            train_dataset=bench.prompts,
            processing_class=bench.tokenizer,
            prompt_format=bench.format,
            pretraining_dataset=bench.texts if arm.gamma else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    records = [record for record in trainer.state.log_history if "objective/scores" in record]
    return {
        "curve": {
            name: [record[name] for record in records]
            for name in ("objective/scores", "objective/kl", "grad_norm_ratio_ptx")
            if name in records[0]
        },
        "logged": {
            name: statistics.fmean(record[name] for record in records[-max(1, len(records) // 4) :])
            for name in LOGGED
            if name in records[0]
        },
        "measured": bench.measure(policy),
    }


def summarise(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and 95 % intervals over seeds of every combination."""
    found = []
    keys = ("reductions", "whiten", "learning_rate", "gamma")
    for key in sorted({tuple(point[name] for name in keys) for point in points}):
        same = [point for point in points if tuple(point[name] for name in keys) == key]
        values = [{**point["measured"], **{n: v for n, v in point["logged"].items()}} for point in same]
        found.append(
            {
                **dict(zip(keys, key, strict=True)),
                "seeds": sorted(point["seed"] for point in same),
                **{name: common.mean_interval([value[name] for value in values]) for name in values[0]},
            }
        )
    return found


def measure(options: argparse.Namespace, path: Path) -> None:
    """Run every combination that is missing; `path` holds what is done after each."""
    bench = make_bench(options)
    header = common.header()
    commands = [header.pop("command")]
    run: dict[str, Any] = {
        **header,
        "commands": commands,
        "bench": bench.label,
        "settings": {**bench.settings, "iterations": options.iterations, "held_out": options.held_out},
        "points": [],
    }
    known = [other for other in common.read_runs(path) if all(other[k] == run[k] for k in ("bench", "settings"))]
    if known:
        run = {**run, **{name: known[0][name] for name in ("points", "start")}}
        run["commands"] = list(dict.fromkeys([*known[0]["commands"], *run["commands"]]))
    else:
        run["start"] = bench.measure(bench.policy())
    print(f"{bench.label}, before PPO: {run['start']}", flush=True)
    done = {tuple(point[name] for name in Arm.__dataclass_fields__) for point in run["points"]}
    rates = options.learning_rates or [bench.settings["learning_rate"]]
    for seed, rate, names, gamma in itertools.product(options.seeds, rates, options.reductions, options.gammas):
        arm = Arm(names, gamma, rate, not options.raw_advantages, seed)
        if tuple(asdict(arm).values()) in done:
            continue
        started = time.perf_counter()
        found = train(arm, bench, options.iterations)
        gc.collect()
        run["points"].append(common.rounded({**asdict(arm), **found, "seconds": time.perf_counter() - started}))
        run["summary"] = summarise(run["points"])
        common.write_run(path, run, same=("bench", "settings"))
        print(describe(run["points"][-1]), flush=True)


def make_bench(options: argparse.Namespace) -> Bench:
    """Models, prompts and text that the command line asks for.

    Raises:
        BenchmarkError: if a model folder comes without prompts or text.
    """
    if options.model is None:
        return LabBench(options.run, options.held_out)
    if not (options.prompts and options.text):
        raise BenchmarkError("--model needs --prompts and --text")
    return FileBench(options.model, options.prompts, options.text, options.held_out, options.value_layers)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__, "ptx_gamma_<bench>")
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


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    path = options.output or common.RESULTS / f"ptx_gamma_{options.model.name if options.model else 'lab'}.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
