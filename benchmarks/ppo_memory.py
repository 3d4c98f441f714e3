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
from ppo import add_job_options, check_job_options, make_job, running, shape
from ppo_memory_report import draw, table
from ppo_models import prepare
from ppo_report import OURS, TRAIN


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
    defaults = dict(model="random-7b", dtype="bfloat16", episodes=8, minibatch=4, sizes="4:1")
    add_job_options(parser, **defaults, prompt=(512, 512), completion=512)
    parser.add_argument("--train", choices=[name for name in TRAIN if name != "full"], default="qlora")
    parser.add_argument("--iterations", type=int, default=2, help="the first one makes the optimizer's state")
    options = parser.parse_args(arguments)
    check_job_options(parser, options, options.sizes)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    path = options.output or common.RESULTS / f"ppo_memory_{common.device_name()}.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
