"""Memory of an iteration of PPO whose four roles are adapters on one base.

    python benchmarks/ppo_memory.py    # 7 billion parameters in 4 bits, policy and reward model of that size
    python benchmarks/ppo_memory.py --model random-1b --train lora
    python benchmarks/ppo_memory.py --draw    # the chart of the result file

Policy, reference, reward model and value model share the base (benchmarks/ppo.py compares time and memory with TRL,
which needs a base for each of three). Weights are drawn at random: only their shapes matter. The 7B model takes 14 GB
of disk, and minutes for every few hundred tokens on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.report import BLUE, GREY, ORANGE, Run, figure, list_cases, markdown, note
from common.results import header, write_run
from common.script import command_line, device_name, measure_or_draw, start
from ppo import TRAIN, add_job_options, check_job_options, make_job, shape
from sides.job import OURS
from sides.models import prepare
from sides.running import running

TARGET_GIB = 16
_COLUMNS = (
    *("model", "training", "tokens of a prompt, of an answer", "episodes, in a pass without and with gradient"),
    *("models", "peak of loading", "peak of an iteration"),
)


def measure(options: argparse.Namespace, path: Path) -> None:
    """Load the models, run the iterations, and keep the process's memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(options.model, options.train, options.dtype, Path(scratch))
        job = replace(make_job(options, options.train, folder), gradient_checkpointing=True)
        print("the models are written; loading them", flush=True)
        with running(OURS, sys.executable, job) as (side, loaded):
            iterations = []
            for number in range(1, options.iterations + 1):
                iterations.append(side.iterate())
                print(f"iteration {number}: {iterations[-1]}", flush=True)
    run = {**header(), "model": options.model, "train": options.train, "dtype": options.dtype, **shape(job)}
    # Above the memory after imports; models are loaded after that.
    run |= {"loading_mib": loaded["loading_mib"], "models_mib": loaded["held_mib"], "iterations": iterations}
    run["peak_mib"] = max(item["peak_mib"] for item in iterations)
    print(f"models {run['models_mib']:.0f} MiB, peak {run['peak_mib']:.0f} MiB")
    write_run(path, run, same=("model", "dtype", "train", "prompt", "completion"))


def draw(runs: list[Run], chart: Path) -> None:
    """Memory of the loaded models, and of an iteration above them."""
    with figure(chart, 8.0, 1.5 + 0.45 * len(runs)) as made:
        axes = made.subplots()
        models, peaks = ([run[name] / 1024 for run in runs] for name in ("models_mib", "peak_mib"))
        above = [peak - model for peak, model in zip(peaks, models, strict=True)]
        axes.barh(range(len(runs)), models, color=BLUE, height=0.5, label="models")
        axes.barh(range(len(runs)), above, left=models, color=ORANGE, height=0.5, label="an iteration, at its peak")
        for place, peak in enumerate(peaks):
            note(axes, f"{peak:.1f}", (peak, place), 5)
        axes.axvline(TARGET_GIB, color=GREY, linewidth=1, linestyle=":")
        axes.annotate("a 16 GB card", (TARGET_GIB, -0.45), xytext=(-5, 0), textcoords="offset points", ha="right")
        labels = [
            f"{run['model']}, {TRAIN[run['train']]},\n{run['prompt'][1]} + {run['completion']} tokens" for run in runs
        ]
        list_cases(axes, labels, "memory, GiB")
        axes.set_xlim(0, 1.1 * max(TARGET_GIB, *peaks))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, frameon=False)


def table(runs: list[Run]) -> str:
    """The table of the documentation."""
    rows = [
        [
            f"{run['model']}, {run['dtype']}",
            TRAIN[run["train"]],
            f"{run['prompt'][1]}, {run['completion']}",
            f"{run['episodes']}, {run['sizes']['rollout_batch']} and {run['sizes']['micro_batch']}",
            *(f"{run[name] / 1024:.1f} GiB" for name in ("models_mib", "loading_mib", "peak_mib")),
        ]
        for run in runs
    ]
    return markdown(_COLUMNS, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "ppo_memory_<device>")
    defaults = dict(model="random-7b", dtype="bfloat16", episodes=8, minibatch=4, sizes="4:1")
    add_job_options(parser, **defaults, prompt=(512, 512), completion=512)
    parser.add_argument("--train", choices=[name for name in TRAIN if name != "full"], default="qlora")
    parser.add_argument("--iterations", type=int, default=2, help="the first one makes the optimizer's state")
    options = parser.parse_args(arguments)
    check_job_options(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    measure_or_draw(parse(arguments), f"ppo_memory_{device_name()}", measure, draw, table)


if __name__ == "__main__":
    start(main)
