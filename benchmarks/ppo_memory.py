"""Memory of an iteration of PPO whose four roles are adapters on one base.

    python benchmarks/ppo_memory.py    # 7 billion parameters in 4 bits, policy and reward model of that size
    python benchmarks/ppo_memory.py --model random-1b --train lora
    python benchmarks/ppo_memory.py --draw    # the chart of what has been measured

Policy, reference, reward model and value model share the base (benchmarks/ppo.py compares time and memory with TRL,
which needs a base for each of three). Weights are drawn at random: only their shapes matter. The 7B model takes 14 GB
of disk, and minutes for every few hundred tokens on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import common
from ppo import make_job, running, shape, sizes
from ppo_memory_report import draw, table
from ppo_models import prepare
from ppo_report import OURS, TRAIN
from random_models import RANDOM


def measure(options: argparse.Namespace, path: Path) -> None:
    """Load the models, make the iterations, and keep what the process held."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(options.model, options.train, options.dtype, Path(scratch))
        job = make_job(options, options.train, folder, common.device_name() == "cuda")
        job = replace(job, gradient_checkpointing=True)
        print("the models are written; loading them", flush=True)
        with running(OURS, sys.executable, job) as (side, loaded):
            iterations = []
            for number in range(1, options.iterations + 1):
                iterations.append(side.iterate())
                print(f"iteration {number}: {iterations[-1]}", flush=True)
    run = {**common.header(), "model": options.model, "train": options.train, "dtype": options.dtype, **shape(job)}
    # Above what the process held after imports; models are loaded after that.
    run |= {"loading_mib": loaded["loading_mib"], "models_mib": loaded["held_mib"], "iterations": iterations}
    run["peak_mib"] = max(item["peak_mib"] for item in iterations)
    print(f"models {run['models_mib']:.0f} MiB, peak {run['peak_mib']:.0f} MiB")
    common.write_run(path, run, same=("model", "dtype", "train", "prompt", "completion"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__, "ppo_memory_<device>")
    parser.add_argument("--model", default="random-7b", help=f"lab, {', '.join(RANDOM)}, or a model folder")
    parser.add_argument("--train", choices=[name for name in TRAIN if name != "full"], default="qlora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--episodes", type=int, default=8, help="of an iteration")
    parser.add_argument("--minibatch", type=int, default=4, help="episodes of an optimizer step")
    parser.add_argument(
        "--sizes", type=sizes, default="4:1", help="episodes in a pass without gradient and in one with"
    )
    parser.add_argument("--prompt", type=int, nargs=2, default=(512, 512), help="fewest and most tokens")
    parser.add_argument("--completion", type=int, default=512, help="tokens of every answer")
    parser.add_argument("--iterations", type=int, default=2, help="the first one makes the optimizer's state")
    options = parser.parse_args(arguments)
    if options.episodes % options.minibatch or options.minibatch % options.sizes["micro_batch"]:
        parser.error("--episodes must be a multiple of --minibatch, and that of the second of --sizes")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    path = options.output or common.RESULTS / f"ppo_memory_{common.device_name()}.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
