"""One optimizer step of the reward model: this package against trl.RewardTrainer fed every pair of the same rankings.

    python benchmarks/reward_model.py                                  # the lab's base model, six shapes of rankings
    python benchmarks/reward_model.py --model ../smollm2 --prompts 1 --micro_batches 2 6
    python benchmarks/reward_model.py --model random-1b --train qlora  # needs a GPU
    python benchmarks/reward_model.py --model random-1b --attention flex_attention
    python benchmarks/reward_model.py --draw                           # the chart of the result file

Three contenders take the same optimizer step on the same rankings with copies of one model: TRL's trainer on all
pairs, this package with one row per completion, and this package with rows that share the prompt. Their losses and
gradients are compared first, and nothing is timed if they differ. The time is that of `trainer.train()` from its start
to the end of its last optimizer step: data loader, collator, forward, backward and optimizer, without logging and
saving. Peak memory is that of a process of its own, above its memory with the model loaded. TRL's micro-batch is the
fastest of several, and this package's passes take as many tokens as that micro-batch holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.equality import Gradients, gradient_difference, require_equal
from common.memory import BenchmarkError
from common.models import NEED_GPU, RANDOM, write_random
from common.report import BLUE, ORANGE, Run, finish_ratios, legend_below, markdown, ratio_chart, times_faster
from common.results import header, interleave, ratios, spread, write_run
from common.script import command_line, device_name, lacks_gpu, measure_or_draw, quiet, start, two_numbers
from common.training import WEIGHTS
from setups.reward_model import PER_COMPLETION, SHARED, TRL, Case, Contender, Setup

NAMES = {TRL: "TRL, all pairs", PER_COMPLETION: "one row per completion", SHARED: "shared prefix"}
_STYLES: dict[str, tuple[str, str, float]] = {PER_COMPLETION: (BLUE, "s", -0.12), SHARED: (ORANGE, "o", 0.12)}
_COLUMNS = (
    *("model, training", "K", "prompt:completion", "prompts a step", *["TRL", *list(NAMES.values())[1:]]),
    *("times faster", "peak memory, TRL", "shared prefix"),
)
# Prompt and completion tokens: 4:1, 1:1, 1:4.
LENGTHS = ((128, 32), (64, 64), (32, 128))
COMPLETIONS = (4, 9)
# Largest relative difference of loss and gradient. A ranking's gradient is a difference of nearly equal gradients, in
# which half precision keeps few digits, so the bfloat16 runs must first agree in float32.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.5}


def compare(reference: tuple[float, Gradients], other: tuple[float, Gradients], bound: float) -> dict[str, float]:
    """Relative differences of loss and gradient.

    Raises:
        BenchmarkError: if one is above `bound`, or different parameters are trained.
    """
    (loss, gradients), (other_loss, other_gradients) = reference, other
    differences = {
        "loss": abs(other_loss - loss) / abs(loss),
        "gradient": gradient_difference(gradients, other_gradients),
    }
    require_equal(differences, bound)
    return {**differences, "bound": bound}


def check(contenders: Iterator[tuple[str, Contender]], bound: float) -> dict[str, dict[str, float]]:
    """Take one optimizer step with every contender, TRL first, and compare the others' loss and gradient with TRL's.

    Raises:
        BenchmarkError: if they differ by more than rounding does.
    """
    _, trl = next(contenders)
    reference = trl.gradient()
    del trl
    return {name: compare(reference, contender.gradient(), bound) for name, contender in contenders}


def probe(setup: Setup, case: Case, name: str, micro_batch: int) -> dict[str, Any]:
    """Seconds and peak memory of two optimizer steps in a process of their own; the second has the optimizer state.

    Raises:
        BenchmarkError: if the process fails.
    """
    request = json.dumps({"setup": asdict(setup), "case": asdict(case), "name": name, "micro_batch": micro_batch})
    command = [sys.executable, __file__, "--probe", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise BenchmarkError(f"--probe {request} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def answer_probe(request: str) -> None:
    """The process that `probe` starts: print its measurements as one line of JSON."""
    asked = json.loads(request)
    setup, case = Setup(**asked["setup"]), Case(**asked["case"])
    torch.set_num_threads(setup.threads)
    contender = Contender(asked["name"], setup, case, asked["micro_batch"])
    contender.steps(1)
    seconds = contender.steps(1)
    print(json.dumps({"seconds": seconds, "peak_mib": contender.memory.peak_mib()}))


def tune(setup: Setup, case: Case, sizes: list[int]) -> list[dict[str, Any]]:
    """TRL's micro-batches that divide the step's pairs, with seconds and peak memory, the fastest first."""
    tried = []
    for size in (size for size in sizes if case.pairs % size == 0):
        try:
            tried.append({"pairs": size, **probe(setup, case, TRL, size)})
        except BenchmarkError as error:
            if "OutOfMemoryError" not in str(error):
                raise
    if not tried:
        raise BenchmarkError(f"no micro-batch of {sizes} divides the step's {case.pairs} pairs and fits")
    return sorted(tried, key=lambda item: item["seconds"])


def run_case(setup: Setup, case: Case, sizes: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Memory, equality, and interleaved times of one shape of rankings."""
    tried = tune(setup, case, sizes)
    micro_batch, ours = tried[0]["pairs"], (PER_COMPLETION, SHARED)
    peaks = {TRL: tried[0]["peak_mib"], **{name: probe(setup, case, name, micro_batch)["peak_mib"] for name in ours}}
    equality, bound = {}, BOUNDS["float32"]
    if (setup.train, setup.dtype) != ("full", "float32"):
        exact = replace(setup, dtype="float32")
        built = ((name, Contender(name, exact, case, micro_batch).in_float32()) for name in NAMES)
        equality["exact"], bound = check(built, bound), BOUNDS["bfloat16"]
    contenders = {name: Contender(name, setup, case, micro_batch) for name in NAMES}
    equality["measured"] = check(iter(contenders.items()), bound)
    computed = {name: contender.watch.tokens for name, contender in contenders.items()}
    timed = {name: partial(contender.steps, steps) for name, contender in contenders.items()}
    seconds = interleave(timed, rounds)
    spreads = {name: spread(values) for name, values in seconds.items()}
    return {
        **asdict(case),
        "pairs": case.pairs,
        "equality": equality,
        "seconds": spreads,
        "times_faster": {name: ratios(seconds[TRL], seconds[name]) for name in ours},
        "tokens": case.tokens,
        "tokens_per_pass": case.pass_tokens(micro_batch),
        "tokens_computed": computed,
        "tokens_per_second": {name: case.tokens / item["median"] for name, item in spreads.items()},
        "peak_mib": peaks,
        "memory_of_trl": {name: peaks[name] / peaks[TRL] for name in ours},
        "trl_micro_batch": micro_batch,
        "trl_micro_batches": tried,
    }


def measure(options: argparse.Namespace, path: Path) -> None:
    """Run every case; `path` has the finished ones after each."""
    if lacks_gpu(options.model, options.train):
        return
    dtype = options.dtype or ("bfloat16" if options.model in NEED_GPU else "float32")
    label = Path(options.model).name + ("" if options.attention == "sdpa" else f" with {options.attention}")
    cases = [
        Case(completions, prompt, completion, options.prompts)
        for completions, (prompt, completion) in itertools.product(options.completions, options.lengths)
    ]
    run = {**header(), "model": label, "train": options.train, "dtype": dtype, "rounds": options.rounds}
    run |= {"steps_per_round": options.steps, "shapes": [shape(asdict(case)) for case in cases], "cases": []}
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if model in RANDOM:
            model = str(write_random(model, Path(scratch) / model, WEIGHTS[dtype]))
        setup = Setup(model, options.train, dtype, device_name() == "cuda", torch.get_num_threads(), options.attention)
        for case in cases:
            run["cases"].append(run_case(setup, case, options.micro_batches, options.rounds, options.steps))
            write_run(path, run, same=("model", "train", "dtype", "shapes"))
            print(table([{**run, "cases": run["cases"][-1:]}]), flush=True)


def shape(case: dict[str, Any]) -> str:
    """A case's number of completions, and prompt and completion tokens."""
    return f"K = {case['completions']}, {case['prompt']}:{case['completion']}"


def _by_model(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """Cases by model, training and dtype, in the order of K, then from long prompts to long completions."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{run['model']}, {run['train']}, {run['dtype']}", []).extend(run["cases"])
    for cases in groups.values():
        cases.sort(key=lambda case: (case["completions"], case["completion"] / case["prompt"]))
    return groups


def draw(runs: list[Run], chart: Path) -> None:
    """Times faster than TRL, and peak memory, by model and shape of rankings."""
    with ratio_chart(chart, _by_model(runs), base=1.0, group=0.6, case=0.42) as groups:
        for title, cases, time_axes, memory_axes in groups:
            for name, (color, marker, offset) in _STYLES.items():
                for place, case in enumerate(cases):
                    label = NAMES[name] if place == 0 else None
                    times_faster(time_axes, case["times_faster"][name], place + offset, color, 6, marker, label)
                    memory_axes.plot(
                        [case["memory_of_trl"][name]], [place + offset], marker, color=color, markersize=6
                    )
            labels = [shape(case) for case in cases]
            finish_ratios(time_axes, labels, "times faster than TRL on all pairs", 1.15)
            finish_ratios(memory_axes, labels, "peak memory, TRL = 1", 1.15)
            time_axes.set_title(title)
        legend_below(time_axes.figure, groups[0][2])


def table(runs: list[Run]) -> str:
    """The table of the documentation: medians over the rounds, and ratios to TRL."""
    rows = []
    for title, cases in _by_model(runs).items():
        for case in cases:
            faster = {name: f"{item['median']:.1f}" for name, item in case["times_faster"].items()}
            rows.append(
                [
                    *(title, f"{case['completions']}", f"{case['prompt']}:{case['completion']}", f"{case['prompts']}"),
                    *(f"{case['seconds'][name]['median']:.3g} s" for name in NAMES),
                    f"{faster[SHARED]} (per completion {faster[PER_COMPLETION]})",
                    *(f"{case['peak_mib'][name]:.0f} MiB" for name in (TRL, SHARED)),
                ]
            )
    return markdown(_COLUMNS, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "reward_model_<device>")
    parser.add_argument("--model", default="lab", help="lab (default), random-1b (needs a GPU), or a model folder")
    parser.add_argument("--train", choices=["full", "qlora"], default="full", help="which weights are trained")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32, or bfloat16 for random-1b")
    parser.add_argument("--attention", default="sdpa", help="of all contenders; flex_attention needs a GPU")
    parser.add_argument("--completions", type=int, nargs="+", default=list(COMPLETIONS), metavar="K")
    parser.add_argument("--lengths", type=two_numbers, nargs="+", default=list(LENGTHS), metavar="PROMPT:COMPLETION")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per optimizer step")
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[2, 6, 12, 36], help="pairs per pass of TRL, best one taken"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of one repetition")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    if options.probe:
        with quiet():
            answer_probe(options.probe)
    else:
        measure_or_draw(options, f"reward_model_{device_name()}", measure, draw, table)


if __name__ == "__main__":
    start(main)
