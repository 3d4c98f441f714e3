"""One optimizer step of the reward model: this package against trl.RewardTrainer fed every pair of the same rankings.

    python benchmarks/reward_model.py                                  # the lab's base model, six shapes of rankings
    python benchmarks/reward_model.py --model ../smollm2 --prompts 1 --micro_batches 2 6
    python benchmarks/reward_model.py --model random-1b --train qlora  # needs a GPU
    python benchmarks/reward_model.py --model random-1b --attention flex_attention
    python benchmarks/reward_model.py --draw                           # the chart of what has been measured

Three contenders take the same optimizer step on the same rankings with copies of one model: TRL's trainer on all
pairs, this package with one row per completion, and this package with rows that share the prompt. Their losses and
gradients are compared first, and nothing is timed if they differ. What is timed is `trainer.train()` from its start to
the end of its last optimizer step: data loader, collator, forward, backward and optimizer, without logging and saving.
Peak memory is that of a process of its own, above what it held once the model was loaded. TRL's micro-batch is the
fastest of several, and this package's passes take as many tokens as that micro-batch holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import BenchmarkError
from contenders import Case, Contender, Setup
from random_models import NEED_GPU, RANDOM, write_random
from reward_model_report import NAMES, PER_COMPLETION, SHARED, TRL, describe, draw, shape, table

# Prompt and completion tokens: 4:1, 1:1, 1:4.
LENGTHS = ((128, 32), (64, 64), (32, 128))
COMPLETIONS = (4, 9)
# Largest relative difference of loss and gradient. A ranking's gradient is a difference of nearly equal gradients, in
# which half precision keeps few digits, so what is measured in bfloat16 must first agree in float32.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.5}


def compare(
    reference: tuple[float, dict[str, torch.Tensor]], found: tuple[float, dict[str, torch.Tensor]], bound: float
) -> dict[str, float]:
    """Relative differences of loss and gradient (the norm of the difference over the norm, all parameters as one).

    Raises:
        BenchmarkError: if one is above `bound`, or different parameters are trained.
    """
    (loss, gradients), (other_loss, other_gradients) = reference, found
    if gradients.keys() != other_gradients.keys() or not gradients:
        raise BenchmarkError("the contenders train different parameters")
    square = sum(item.double().square().sum().item() for item in gradients.values())
    distance = sum((other_gradients[name] - item).double().square().sum().item() for name, item in gradients.items())
    differences = {"loss": abs(other_loss - loss) / abs(loss), "gradient": math.sqrt(distance / square)}
    if not all(value <= bound for value in differences.values()):
        raise BenchmarkError(
            "the contenders do not compute the same thing: relative difference of the loss "
            f"{differences['loss']:.2e}, of the gradient {differences['gradient']:.2e}, allowed {bound:.0e}"
        )
    return {**differences, "bound": bound}


def probe(setup: Setup, case: Case, name: str, micro_batch: int) -> dict[str, Any]:
    """Seconds and peak memory of two optimizer steps in a process of their own; the second has the optimizer state."""
    request = json.dumps({"setup": asdict(setup), "case": asdict(case), "name": name, "micro_batch": micro_batch})
    return common.in_subprocess(__file__, ["--probe", request])


def answer_probe(request: str) -> None:
    """The other side of `probe`: print what was measured as one line of JSON."""
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
    for size in sizes:
        if case.pairs % size:
            continue
        try:
            tried.append({"pairs": size, **probe(setup, case, TRL, size)})
        except BenchmarkError as error:
            if "OutOfMemoryError" not in str(error):
                raise
    if not tried:
        raise BenchmarkError(f"no micro-batch of {sizes} divides the step's {case.pairs} pairs and fits")
    return sorted(tried, key=lambda item: item["seconds"])


def check(contenders: Iterator[tuple[str, Contender]], bound: float) -> dict[str, dict[str, float]]:
    """Take one optimizer step with every contender, TRL first, and compare the others' loss and gradient with its.

    Raises:
        BenchmarkError: if they differ by more than rounding does.
    """
    _, trl = next(contenders)
    reference = trl.gradient()
    del trl
    return {name: compare(reference, contender.gradient(), bound) for name, contender in contenders}


def run_case(setup: Setup, case: Case, sizes: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Memory, equality, and interleaved times of one shape of rankings."""
    tried = tune(setup, case, sizes)
    micro_batch = tried[0]["pairs"]
    peaks = {TRL: tried[0]["peak_mib"]}
    peaks |= {name: probe(setup, case, name, micro_batch)["peak_mib"] for name in (PER_COMPLETION, SHARED)}
    equality, bound = {}, BOUNDS["float32"]
    if (setup.train, setup.dtype) != ("full", "float32"):
        exact = replace(setup, dtype="float32")
        built = ((name, Contender(name, exact, case, micro_batch).in_float32()) for name in NAMES)
        equality["exact"], bound = check(built, bound), BOUNDS["bfloat16"]
    contenders = {name: Contender(name, setup, case, micro_batch) for name in NAMES}
    equality["measured"] = check(iter(contenders.items()), bound)
    computed = {name: contender.watch.tokens for name, contender in contenders.items()}
    seconds = common.interleave(
        {name: partial(contender.steps, steps) for name, contender in contenders.items()}, rounds
    )
    return {
        **asdict(case),
        "pairs": case.pairs,
        "equality": equality,
        "seconds": {name: common.spread(values) for name, values in seconds.items()},
        "times_faster": {name: common.ratios(seconds[TRL], seconds[name]) for name in (PER_COMPLETION, SHARED)},
        "tokens": case.tokens,
        "tokens_per_pass": case.pass_tokens(micro_batch),
        "tokens_computed": computed,
        "tokens_per_second": {name: case.tokens / common.spread(values)["median"] for name, values in seconds.items()},
        "peak_mib": peaks,
        "memory_of_trl": {name: peaks[name] / peaks[TRL] for name in (PER_COMPLETION, SHARED)},
        "trl_micro_batch": micro_batch,
        "trl_micro_batches": tried,
    }


def measure(options: argparse.Namespace, path: Path) -> None:
    """Run every case and keep what is done in `path` after each."""
    cuda = common.device_name() == "cuda"
    if not cuda and (options.model in NEED_GPU or options.train == "qlora"):
        print(f"skipped: {options.model} with {options.train} training needs a GPU, and torch sees none")
        return
    dtype = options.dtype or ("bfloat16" if options.model in NEED_GPU else "float32")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder in RANDOM:
            folder = str(Path(scratch) / folder)
            write_random(options.model, Path(folder), getattr(torch, dtype))
        setup = Setup(folder, options.train, dtype, cuda, torch.get_num_threads(), options.attention)
        label = options.model if options.model in (*RANDOM, "lab") else Path(options.model).name
        label += "" if options.attention == "sdpa" else f" with {options.attention}"
        run = {**common.header(), "model": label, "train": options.train, "dtype": dtype, "rounds": options.rounds}
        cases = [
            Case(completions, prompt, completion, options.prompts)
            for completions, (prompt, completion) in itertools.product(options.completions, options.lengths)
        ]
        run |= {"steps_per_round": options.steps, "shapes": [shape(asdict(case)) for case in cases], "cases": []}
        for case in cases:
            found = run_case(setup, case, options.micro_batches, options.rounds, options.steps)
            print(describe(found), flush=True)
            run["cases"].append(found)
            common.write_run(path, run, same=("model", "train", "dtype", "shapes"))


def lengths(text: str) -> tuple[int, int]:
    """`"128:32"` as (128, 32)."""
    prompt, _, completion = text.partition(":")
    return int(prompt), int(completion)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__, "reward_model_<device>")
    parser.add_argument("--model", default="lab", help="lab (default), random-1b (needs a GPU), or a model folder")
    parser.add_argument("--train", choices=["full", "qlora"], default="full", help="which weights are trained")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32, or bfloat16 for random-1b")
    parser.add_argument("--attention", default="sdpa", help="of all contenders; flex_attention needs a GPU")
    parser.add_argument("--completions", type=int, nargs="+", default=list(COMPLETIONS), metavar="K")
    parser.add_argument("--lengths", type=lengths, nargs="+", default=list(LENGTHS), metavar="PROMPT:COMPLETION")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per optimizer step")
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[2, 6, 12, 36], help="pairs per pass of TRL, best one taken"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of one repetition")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    if options.probe:
        with common.quiet():
            answer_probe(options.probe)
        return
    path = options.output or common.RESULTS / f"reward_model_{common.device_name()}.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
