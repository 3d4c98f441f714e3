"""One iteration of PPO: this package's PPOTrainer against TRL 1.12.0's, the last release that has one.

    python -m venv trl-1.12
    trl-1.12/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 peft datasets accelerate
    python benchmarks/ppo.py --peer_python trl-1.12/bin/python    # 3.4M parameters under a vocabulary of 49k
    python benchmarks/ppo.py --peer_python ... --model SMOLLM2 --episodes 16 --completion 64 --rounds 2
    python benchmarks/ppo.py --peer_python ... --model SMOLLM2 --train full --dtype mixed
    python benchmarks/ppo.py --peer_python ... --model random-1b --dtype bfloat16    # needs a GPU
    python benchmarks/ppo.py --peer_python ... --model random-7b --train qlora --lengths varying --rounds 1
    python benchmarks/ppo.py --draw    # the chart of the result file

Both sides sample and score the same prompts with the same models and take the same number of optimizer steps. Each is
a process in its own environment that stops after every iteration, so that they take turns; loading and imports are
not timed. First both compute the same stored completions, and nothing is timed if the results differ.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common.models import RANDOM
from common.report import BLUE, ORANGE, Run, finish_ratios, markdown, note, ratio_chart, times_faster
from common.results import header, ratios, spread, write_run
from common.script import command_line, device_name, lacks_gpu, measure_or_draw, start, two_numbers
from common.training import WEIGHTS
from sides.equality import check
from sides.job import BASE, OURS, PEER, POLICY, Job
from sides.models import biases, make_prompts, prepare
from sides.running import both_pythons, peer_versions, running
from transformers import AutoConfig

from instructgpt_hf.models.loading import load_tokenizer

NAMES = {PEER: "TRL 1.12.0", OURS: "this package"}
TRAIN = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
LENGTHS = {"equal": "equal lengths", "varying": "varying lengths"}
_COLUMNS = (
    *("model", "training", "answers: longest, mean of both", "episodes, steps", *NAMES.values()),
    *("times faster (by processor time)", "peak memory, TRL 1.12.0", "this package", "ratio (above the models)"),
)
SIZES = "episodes in a pass without gradient and in one with, as ROLLOUT:MICRO"


def measure(options: argparse.Namespace, path: Path) -> None:
    """Run every case; `path` has the finished ones after each."""
    if lacks_gpu(options.model, *options.train):
        return
    pythons = both_pythons(options.peer_python)
    base = {**header(), "peer_versions": peer_versions(options.peer_python), "model": Path(options.model).name}
    base |= {"dtype": options.dtype, "rounds": options.rounds}
    for train in options.train:
        with tempfile.TemporaryDirectory() as scratch:
            folder = prepare(options.model, train, options.dtype, Path(scratch))
            job = make_job(options, train, folder)
            equality = check(pythons, job)
            for lengths in options.lengths:
                mean = options.completion / 3 if lengths == "varying" else None
                biased = replace(job, biases=biases(folder, options.dtype, job.prompts, job.completion, mean))
                run = {**base, "train": train, "lengths": lengths, **shape(biased), "equality": equality}
                run |= measure_case(pythons, biased, options.peer_sizes, options.rounds)
                write_run(path, run, same=("model", "dtype", "train", "lengths", "completion"))
                print(table([run]), flush=True)


def make_job(options: argparse.Namespace, train: str, folder: Path) -> Job:
    """The job of the command line, with EOS and padding excluded."""
    tokenizer = load_tokenizer(folder / POLICY)
    source = folder / (POLICY if train == "full" else BASE)
    vocabulary = AutoConfig.from_pretrained(source).get_text_config().vocab_size
    prompts = make_prompts(options.episodes, *options.prompt, tokenizer, vocabulary)
    return Job(
        folder=str(folder),
        train=train,
        dtype=options.dtype,
        cuda=device_name() == "cuda",
        threads=torch.get_num_threads(),
        prompts=prompts,
        episodes=options.episodes,
        minibatch=options.minibatch,
        completion=options.completion,
        **options.sizes,
        biases=biases(folder, options.dtype, prompts, options.completion, None),
    )


def shape(job: Job) -> dict[str, Any]:
    """A case's sizes."""
    lengths = [len(prompt) for prompt in job.prompts]
    return {
        "episodes": job.episodes,
        "optimizer_steps": job.steps,
        "minibatch": job.minibatch,
        "prompt": [min(lengths), max(lengths)],
        "completion": job.completion,
        "sizes": {"rollout_batch": job.rollout_batch, "micro_batch": job.micro_batch},
        "biases": job.biases,
    }


def measure_case(pythons: dict[str, str], job: Job, peer_sizes: list[dict[str, int]], rounds: int) -> dict[str, Any]:
    """Iterations of both sides in turns. The first of each, which creates the optimizer's state, is not timed."""
    tried = tune(pythons[PEER], job, peer_sizes)
    jobs = {PEER: replace(job, **tried[0]["sizes"]), OURS: job}
    iterations: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(running(name, pythons[name], jobs[name])) for name in pythons}
        for _ in range(rounds + 1):
            for name, (side, _loaded) in sides.items():
                iterations[name].append(side.iterate())

    def timed(key: str) -> dict[str, list[float]]:
        return {name: [item[key] for item in reports[1:]] for name, reports in iterations.items()}

    seconds, processor = timed("seconds"), timed("processor_seconds")
    loaded = {name: memory for name, (_, memory) in sides.items()}
    peaks = {name: max(item["peak_mib"] for item in reports) for name, reports in iterations.items()}
    above = {name: peaks[name] - loaded[name]["held_mib"] for name in pythons}
    lengths = {name: [item["mean_length"] for item in reports] for name, reports in iterations.items()}
    return {
        "peer_sizes": tried,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_faster": ratios(seconds[PEER], seconds[OURS]),
        # Processor time excludes other processes of the machine.
        "processor_seconds": {name: spread(values) for name, values in processor.items()},
        "times_less_processor": ratios(processor[PEER], processor[OURS]),
        "mean_length": {name: sum(values) / len(values) for name, values in lengths.items()},
        # Above the memory after imports; models are loaded after that.
        "peak_mib": peaks,
        "loading_mib": {name: item["loading_mib"] for name, item in loaded.items()},
        "models_mib": {name: item["held_mib"] for name, item in loaded.items()},
        "peak_above_models_mib": above,
        "memory_of_peer": peaks[OURS] / peaks[PEER],
        "memory_above_models_of_peer": above[OURS] / above[PEER],
    }


def tune(python: str, job: Job, tried_sizes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """One iteration of the peer with each of several sizes of its passes, the fastest first."""
    if len(tried_sizes) == 1:
        return [{"sizes": tried_sizes[0]}]
    tried = []
    for one in tried_sizes:
        with running(PEER, python, replace(job, **one)) as (side, _):
            iteration = side.iterate()
        tried.append({"sizes": one, **{key: iteration[key] for key in ("processor_seconds", "seconds", "peak_mib")}})
    return sorted(tried, key=lambda item: item["seconds" if job.cuda else "processor_seconds"])


def sizes(text: str) -> dict[str, int]:
    """`"64:8"` as the two fields of a job."""
    return dict(zip(("rollout_batch", "micro_batch"), two_numbers(text), strict=True))


def add_job_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of `make_job` to a command line, with these defaults."""
    parser.add_argument("--model", help=f"lab, {', '.join(RANDOM)}, or a model folder")
    parser.add_argument("--dtype", choices=list(WEIGHTS), help="mixed: float32 weights, bfloat16 arithmetic")
    parser.add_argument("--episodes", type=int, help="of an iteration")
    parser.add_argument("--minibatch", type=int, help="episodes of an optimizer step")
    parser.add_argument("--sizes", type=sizes, help=f"{SIZES}, of this package")
    parser.add_argument("--prompt", type=int, nargs=2, help="fewest and most tokens")
    parser.add_argument("--completion", type=int, help="most tokens")
    parser.set_defaults(**defaults)


def check_job_options(parser: argparse.ArgumentParser, options: argparse.Namespace, *others: dict[str, int]) -> None:
    """Exit with an error unless episodes are whole minibatches, and these whole passes of every size."""
    if options.episodes % options.minibatch:
        parser.error("--episodes must be a multiple of --minibatch")
    if any(options.minibatch % one["micro_batch"] for one in (options.sizes, *others)):
        parser.error("--minibatch must be a multiple of every MICRO")


def draw(runs: list[Run], chart: Path) -> None:
    """Times faster than TRL, and peak memory, by model, training and lengths."""
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(f"{run['model']}, {run['dtype']}", []).append(run)
    with ratio_chart(chart, models, base=0.6, group=0.9, case=0.35) as groups:
        for title, cases, time_axes, memory_axes in groups:
            for place, run in enumerate(cases):
                memory = run["memory_of_peer"]
                times_faster(time_axes, run["times_faster"], place, BLUE, 7)
                memory_axes.plot([memory], [place], "s", color=ORANGE, markersize=6)
                note(memory_axes, f"{memory:.2f}", (memory, place), 7, color=ORANGE, fontsize="small")
            labels = [f"{TRAIN[run['train']]}, {run['lengths']}, {run['completion']} tokens" for run in cases]
            finish_ratios(time_axes, labels, "times faster than TRL 1.12.0", 1.2)
            finish_ratios(memory_axes, labels, "peak memory, TRL 1.12.0 = 1", 1.2)
            time_axes.set_title(title)


def table(runs: list[Run]) -> str:
    """The table of the documentation: medians over the rounds, and ratios to TRL."""
    rows = []
    for run in runs:
        means, faster = run["mean_length"], run["times_faster"]["median"]
        rows.append(
            [
                f"{run['model']}, {run['dtype']}",
                TRAIN[run["train"]],
                f"{run['lengths']}, {run['completion']}, {means[PEER]:.0f} and {means[OURS]:.0f}",
                f"{run['episodes']}, {run['optimizer_steps']}",
                *(f"{run['seconds'][name]['median']:.3g} s" for name in NAMES),
                f"{faster:.2f} ({run['times_less_processor']['median']:.2f})",
                *(f"{run['peak_mib'][name]:.0f} MiB" for name in NAMES),
                f"{run['memory_of_peer']:.2f} ({run['memory_above_models_of_peer']:.2f})",
            ]
        )
    return markdown(_COLUMNS, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "ppo_<device>")
    parser.add_argument("--peer_python", help="Python of an environment with TRL 1.12.0")
    defaults = dict(model="random-3m", dtype="float32", episodes=64, minibatch=8, sizes="8:2")
    add_job_options(parser, **defaults, prompt=(32, 64), completion=128)
    parser.add_argument("--train", nargs="+", choices=list(TRAIN), default=["full", "lora"])
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument(
        "--peer_sizes", type=sizes, nargs="+", default=[sizes("64:8")], help=f"{SIZES}, best one taken"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each side, in turns")
    options = parser.parse_args(arguments)
    check_job_options(parser, options, *options.peer_sizes)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    measure_or_draw(options, f"ppo_{device_name()}", measure, draw, table)


if __name__ == "__main__":
    start(main)
