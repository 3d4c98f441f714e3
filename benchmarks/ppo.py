"""One iteration of PPO: this package's PPOTrainer against TRL 1.12.0's, the last release that has one.

    python -m venv trl-1.12
    trl-1.12/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 peft datasets accelerate
    python benchmarks/ppo.py --peer_python trl-1.12/bin/python    # 3.4M parameters under a vocabulary of 49k
    python benchmarks/ppo.py --peer_python ... --model SMOLLM2 --episodes 16 --completion 64 --rounds 2
    python benchmarks/ppo.py --peer_python ... --model SMOLLM2 --train full --dtype mixed
    python benchmarks/ppo.py --peer_python ... --model random-1b --dtype bfloat16    # needs a GPU
    python benchmarks/ppo.py --peer_python ... --model random-7b --train qlora --lengths varying --rounds 1
    python benchmarks/ppo.py --draw    # the chart of what has been measured

Both sides sample and score the same prompts with the same models and take the same number of optimizer steps. Each is
a process in its own environment that stops after every iteration, so that they take turns; loading and imports are
not timed. What they compute on stored answers is compared first, and nothing is timed if it differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import common
import torch
from common import BenchmarkError
from ppo_models import biases, make_prompts, prepare
from ppo_report import LENGTHS, OURS, PEER, TRAIN, describe, draw, table
from ppo_side import POLICY, WEIGHTS, Job
from random_models import NEED_GPU, RANDOM
from transformers import AutoConfig

from instructgpt_hf.models.loading import load_tokenizer

SCRIPTS = {PEER: "ppo_peer.py", OURS: "ppo_ours.py"}
# Largest relative difference of what is compared (norm of the difference over norm) in float32.
BOUND = 1e-3
# Compared answers end on average at a third of their longest; 1 and the longest are among them.
CHECKED_EPISODES, CHECKED_TOKENS = 4, 16
# The second step's gradient is that of moved weights, in which rounding grows with the length of the first step.
CHECKED_LEARNING_RATE = 0.02
SIZES = "episodes in a pass without gradient and in one with, as ROLLOUT:MICRO"


class Side:
    """A running side.

    Args:
        name: `PEER` or `OURS`.
        python: of its environment.
        job: written to `folder`.
        folder: for the job and what the process says.
    """

    def __init__(self, name: str, python: str, job: Job, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        script = str(Path(__file__).parent / SCRIPTS[name])
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [python, script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def read(self) -> dict[str, Any]:
        """The next line it writes.

        Raises:
            BenchmarkError: if the process ends instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.name} ended:\n{self.log.read_text(encoding='utf-8')[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def iterate(self) -> dict[str, Any]:
        """One iteration."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def running(name: str, python: str, job: Job) -> Iterator[tuple[Side, dict[str, Any]]]:
    """A side with its models loaded, and what it holds then."""
    with tempfile.TemporaryDirectory() as folder:
        side = Side(name, python, job, Path(folder))
        try:
            yield side, side.read()
        finally:
            side.stop()


def relative(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; the norm of `found` where the reference is 0."""
    difference, norm = (found.double() - reference.double()).norm(), reference.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def compare(peer: dict[str, Any], ours: dict[str, Any], whole: bool) -> dict[str, float]:
    """Relative differences of everything two records hold.

    Args:
        peer: what TRL recorded.
        ours: what this package recorded.
        whole: also the value model's loss and gradient. TRL gives an answer that ends early one value more, that of
            the state after EOS, which this package has not.

    Raises:
        BenchmarkError: if one is above the bound, or the sides train different parameters.
    """
    differences = {name: relative(item, ours["tensors"][name]) for name, item in peer["tensors"].items()}
    for name in ("kl", "policy_loss", *(["value_loss"] if whole else [])):
        reference, found = peer["scalars"][name], ours["scalars"][name]
        differences[name] = abs(found - reference) / abs(reference)
    for number, (reference, found) in enumerate(zip(peer["steps"], ours["steps"], strict=True), start=1):
        if reference.keys() != found.keys() or not reference:
            raise BenchmarkError(
                f"the sides train different parameters: {sorted(reference.keys() ^ found.keys())[:6]}"
            )
        for role in ("policy", *(["value_model"] if whole else [])):
            vectors = [
                torch.cat([item[name].flatten() for name in sorted(item) if name.startswith(role)])
                for item in (reference, found)
            ]
            differences[f"{role}_gradient_{number}"] = relative(*vectors)
    wrong = {name: value for name, value in differences.items() if not value <= BOUND}
    if wrong:
        raise BenchmarkError(
            "the sides do not compute the same thing; relative differences above "
            f"{BOUND:.0e}: {', '.join(f'{name} {value:.1e}' for name, value in wrong.items())}"
        )
    return differences


def stored(prompts: list[list[int]], completion: int, ends: bool, tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """A few prompts with random answers, all of full length, or with lengths from 1 to the longest and EOS."""
    chosen = [prompts[round(i * (len(prompts) - 1) / (CHECKED_EPISODES - 1))] for i in range(CHECKED_EPISODES)]
    shape = (CHECKED_EPISODES, completion, completion, tokenizer, vocabulary)
    answers = make_prompts(*shape)
    if ends:
        lengths = [1 + round((completion - 1) * (i / (CHECKED_EPISODES - 1)) ** 2) for i in range(CHECKED_EPISODES)]
        cut = [
            [*answer[: length - 1], tokenizer.eos_token_id] for answer, length in zip(answers, lengths, strict=True)
        ]
        answers = [*cut[:-1], answers[-1]]  # the longest one does not end
    sizes = dict.fromkeys(("episodes", "minibatch", "micro_batch", "rollout_batch"), CHECKED_EPISODES)
    return {"prompts": chosen, "completions": answers, **sizes}


def check(pythons: dict[str, str], job: Job) -> dict[str, dict[str, float]]:
    """Let both sides compute stored answers and take two steps on them, and compare.

    Raises:
        BenchmarkError: if they differ.
    """
    tokenizer = load_tokenizer(Path(job.folder) / POLICY)
    vocabulary = len(tokenizer)
    found = {}
    for name, ends in (("full length", False), ("ending early", True)):
        # With lambda = 1 and no discount, where the score is placed does not change an advantage: TRL places it
        # after EOS, this package on EOS.
        changed = stored(job.prompts, min(job.completion, CHECKED_TOKENS), ends, tokenizer, vocabulary)
        lam = 1.0 if ends else job.lam
        with tempfile.TemporaryDirectory() as folder:
            records = {}
            for side, python in pythons.items():
                record = f"{folder}/{side}.pt"
                one = replace(
                    job,
                    **changed,
                    biases={},  # an EOS that never comes has a log-probability that leaves no digits
                    lam=lam,
                    dtype="float32",
                    learning_rate=CHECKED_LEARNING_RATE,
                    record=record,
                )
                with running(side, python, one):
                    records[side] = torch.load(record)
        found[name] = compare(records[PEER], records[OURS], whole=not ends)
    return found


def tune(python: str, job: Job, tried_sizes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """One iteration of the peer with each of several sizes of its passes, the fastest first."""
    if len(tried_sizes) == 1:
        return [{"sizes": tried_sizes[0]}]
    tried = []
    for one in tried_sizes:
        with running(PEER, python, replace(job, **one)) as (side, _):
            found = side.iterate()
        tried.append({"sizes": one, **{key: found[key] for key in ("processor_seconds", "seconds", "peak_mib")}})
    return sorted(tried, key=lambda item: item["seconds" if job.cuda else "processor_seconds"])


def measure_case(pythons: dict[str, str], job: Job, peer_sizes: list[dict[str, int]], rounds: int) -> dict[str, Any]:
    """Iterations of both sides in turns. The first one of each, which makes the optimizer's state, is not timed."""
    tried = tune(pythons[PEER], job, peer_sizes)
    jobs = {PEER: replace(job, **tried[0]["sizes"]), OURS: job}
    iterations: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with ExitStack() as stack:
        entered = {name: stack.enter_context(running(name, pythons[name], jobs[name])) for name in pythons}
        for _ in range(rounds + 1):
            for name, (side, _loaded) in entered.items():
                iterations[name].append(side.iterate())
    seconds, processor = (
        {name: [item[key] for item in found[1:]] for name, found in iterations.items()}
        for key in ("seconds", "processor_seconds")
    )
    loaded = {name: found for name, (_, found) in entered.items()}
    peaks = {name: max(item["peak_mib"] for item in found) for name, found in iterations.items()}
    above = {name: peaks[name] - loaded[name]["held_mib"] for name in pythons}
    found = {
        "peer_sizes": tried,
        "seconds": {name: common.spread(values) for name, values in seconds.items()},
        "times_faster": common.ratios(seconds[PEER], seconds[OURS]),
        # What other processes of the machine take is not in these.
        "processor_seconds": {name: common.spread(values) for name, values in processor.items()},
        "times_less_processor": common.ratios(processor[PEER], processor[OURS]),
        "mean_length": {
            name: sum(item["mean_length"] for item in found) / len(found) for name, found in iterations.items()
        },
        # Above what the process held after imports; models are loaded after that.
        "peak_mib": peaks,
        "loading_mib": {name: item["loading_mib"] for name, item in loaded.items()},
        "models_mib": {name: item["held_mib"] for name, item in loaded.items()},
        "peak_above_models_mib": above,
        "memory_of_peer": peaks[OURS] / peaks[PEER],
        "memory_above_models_of_peer": above[OURS] / above[PEER],
    }
    return found


def measure(options: argparse.Namespace, path: Path) -> None:
    """Run every case and keep what is done in `path` after each."""
    cuda = common.device_name() == "cuda"
    if not cuda and (options.model in NEED_GPU or "qlora" in options.train):
        print(f"skipped: {options.model} with {' and '.join(options.train)} training needs a GPU, and torch sees none")
        return
    pythons = {PEER: options.peer_python, OURS: sys.executable}
    label = options.model if options.model in (*RANDOM, "lab") else Path(options.model).name
    found = {**common.header(), "peer_versions": peer_versions(options.peer_python), "model": label}
    found |= {"dtype": options.dtype, "rounds": options.rounds}
    for train in options.train:
        with tempfile.TemporaryDirectory() as scratch:
            folder = prepare(options.model, train, options.dtype, Path(scratch))
            job = make_job(options, train, folder, cuda)
            equality = check(pythons, job)
            for lengths in options.lengths:
                mean = options.completion / 3 if lengths == "varying" else None
                biased = replace(job, biases=biases(folder, options.dtype, job.prompts, job.completion, mean))
                run = {**found, "train": train, "lengths": lengths, **shape(biased), "equality": equality}
                run |= measure_case(pythons, biased, options.peer_sizes, options.rounds)
                print(describe(run), flush=True)
                common.write_run(path, run, same=("model", "dtype", "train", "lengths", "completion"))


def make_job(options: argparse.Namespace, train: str, folder: Path, cuda: bool) -> Job:
    """The job that the command line asks for, with EOS and padding excluded."""
    tokenizer = load_tokenizer(folder / POLICY)
    source = folder / ("base" if train != "full" else POLICY)
    vocabulary = AutoConfig.from_pretrained(source).get_text_config().vocab_size
    prompts = make_prompts(options.episodes, *options.prompt, tokenizer, vocabulary)
    return Job(
        folder=str(folder),
        train=train,
        dtype=options.dtype,
        cuda=cuda,
        threads=torch.get_num_threads(),
        prompts=prompts,
        episodes=options.episodes,
        minibatch=options.minibatch,
        completion=options.completion,
        **options.sizes,
        biases=biases(folder, options.dtype, prompts, options.completion, None),
    )


def shape(job: Job) -> dict[str, Any]:
    """What a case's sizes are."""
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


def peer_versions(python: str) -> dict[str, str]:
    """Versions of the libraries in the peer's environment.

    Raises:
        BenchmarkError: if it does not run, or has no TRL 1.12.0.
    """
    names = ["torch", "transformers", "trl", "peft", "accelerate", "datasets"]
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkError(f"--peer_python {python}: {getattr(error, 'stderr', None) or error}") from None
    found: dict[str, str] = json.loads(done.stdout)
    if found["trl"] != "1.12.0":
        raise BenchmarkError(f"--peer_python {python} has trl {found['trl']}; the peer is trl 1.12.0")
    return found


def sizes(text: str) -> dict[str, int]:
    """`"64:8"` as the two fields of a job."""
    rollout_batch, _, micro_batch = text.partition(":")
    return {"rollout_batch": int(rollout_batch), "micro_batch": int(micro_batch)}


def add_job_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Give a command line the options of which `make_job` makes a job, with these defaults."""
    parser.add_argument("--model", help=f"lab, {', '.join(RANDOM)}, or a model folder")
    parser.add_argument("--dtype", choices=list(WEIGHTS), help="mixed: float32 weights, bfloat16 arithmetic")
    parser.add_argument("--episodes", type=int, help="of an iteration")
    parser.add_argument("--minibatch", type=int, help="episodes of an optimizer step")
    parser.add_argument("--sizes", type=sizes, help=f"{SIZES}, of this package")
    parser.add_argument("--prompt", type=int, nargs=2, help="fewest and most tokens")
    parser.add_argument("--completion", type=int, help="most tokens")
    parser.set_defaults(**defaults)


def check_job_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *all_sizes: dict[str, int]
) -> None:
    """End with an error unless episodes are whole minibatches, and these whole passes of every size."""
    if options.episodes % options.minibatch:
        parser.error("--episodes must be a multiple of --minibatch")
    if any(options.minibatch % one["micro_batch"] for one in all_sizes):
        parser.error("--minibatch must be a multiple of every MICRO")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__, "ppo_<device>")
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
    if not options.draw and options.peer_python is None:
        parser.error("--peer_python is needed to measure")
    check_job_options(parser, options, options.sizes, *options.peer_sizes)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    path = options.output or common.RESULTS / f"ppo_{common.device_name()}.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
