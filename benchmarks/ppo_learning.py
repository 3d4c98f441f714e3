"""Reward against episodes and processor time: this package's PPOTrainer and TRL 1.12.0's, from the same models.

    python benchmarks/ppo_learning.py --peer_python trl-1.12/bin/python    # benchmarks/ppo.py says how to make it
    python benchmarks/ppo_learning.py --draw    # the picture of the result file

The lab's SFT and reward models are trained first, by the first two stages of the recipe `tiny-cpu`, or taken from the
folder of such a run with `--run`. Then both sides train the policy with the recipe's settings as far as both have
them, without the pretraining gradient, which the peer does not have. The sides take turns, one iteration each, and
report their samples; the reward, which is the mean score of the same reward model, and the gold labeler's score are
computed here, outside of the measured time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common.results import header, read_runs, write_run
from common.script import command_line, measure_or_draw, start
from reports import ppo_learning as report
from rich.console import Console
from setups.lab import RECIPE, LabRun, lab_rows
from sides.job import POLICY, SCALAR, Job
from sides.running import add_peer_option, both_pythons, check_peer_option, peer_versions, running

from instructgpt_hf import pipeline
from instructgpt_hf.config.recipe import load_recipe


class Lab:
    """The lab's prompts, SFT model and reward model, in a folder that both sides load.

    Args:
        run: folder of a run of the recipe, whose first two stages are finished.
        folder: for copies of the two models.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = LabRun(run), folder
        shutil.copytree(self.run.sft, folder / POLICY)
        shutil.copytree(self.run.reward, folder / SCALAR)
        # The peer reads scores without the shift; a constant in rewards and values changes no advantage.
        path = folder / SCALAR / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "reward_shift": 0.0}), encoding="utf-8")
        texts = [row["prompt"] for row in lab_rows("prompts.train")]
        self.texts = {tuple(self.run.format.prompt_ids(text, self.run.tokenizer)): text for text in texts}

    def rewards(self, samples: list[list[list[int]]]) -> dict[str, float]:
        """Mean score of the reward model and of the gold labeler.

        Args:
            samples: ids of a prompt and its completion each.
        """
        prompts, completions = (list(ids) for ids in zip(*samples, strict=True))
        texts = self.run.tokenizer.batch_decode(completions, skip_special_tokens=True)
        reward, gold = self.run.rewards(prompts, completions, [self.texts[tuple(ids)] for ids in prompts], texts)
        return {"reward": reward, "gold": gold}

    def job(self, seed: int) -> Job:
        """The recipe's settings of stage 3."""
        settings = load_recipe(RECIPE).stages["ppo"].values
        minibatch = settings["per_device_train_batch_size"]
        return Job(
            folder=str(self.folder),
            train="full",
            dtype="float32",
            cuda=False,
            threads=torch.get_num_threads(),
            prompts=[list(prompt) for prompt in self.texts if len(prompt) <= settings["max_prompt_length"]],
            episodes=settings["generation_batch_size"],
            minibatch=minibatch,
            micro_batch=minibatch,
            completion=settings["max_completion_length"],
            rollout_batch=settings["per_device_eval_batch_size"],
            biases={},
            learning_rate=settings["learning_rate"],
            beta=settings["beta"],
            seed=seed,
            samples=True,
        )


def curves(pythons: dict[str, str], lab: Lab, seed: int, iterations: int) -> list[dict[str, Any]]:
    """Both sides' rewards by episodes and by seconds of processor time from one seed, an iteration of each in turns.

    The score of an iteration is that of its samples, from before its optimizer steps.
    """
    job = lab.job(seed)
    points: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    seconds = dict.fromkeys(pythons, 0.0)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(running(name, python, job))[0] for name, python in pythons.items()}
        for iteration in range(iterations):
            for name, side in sides.items():
                result = side.iterate()
                point = {"episodes": iteration * job.episodes, "seconds": seconds[name]}
                point |= {key: result[key] for key in ("kl", "mean_length")} | lab.rewards(result["samples"])
                points[name].append(point)
                seconds[name] += result["processor_seconds"]
    return [{"side": name, "seed": seed, "points": points[name], "seconds": seconds[name]} for name in pythons]


def measure(options: argparse.Namespace, path: Path) -> None:
    """Curves of every seed, kept in `path` after each, beside those of other seeds."""
    pythons = both_pythons(options)
    run = {**header(), "peer_versions": peer_versions(options.peer_python), "recipe": RECIPE}
    earlier = [curve for run in read_runs(path) if run["recipe"] == RECIPE for curve in run["curves"]]
    run["curves"] = [curve for curve in earlier if curve["seed"] not in options.seeds]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run" if options.run is None else options.run
        if options.run is None:
            for stage in ("sft", "reward"):
                pipeline.run_stage(load_recipe(RECIPE), stage, folder, Console(stderr=True))
        lab = Lab(folder, Path(scratch) / "models")
        run["episodes_per_iteration"] = lab.job(0).episodes
        for seed in options.seeds:
            run["curves"] += curves(pythons, lab, seed, options.iterations)
            run["summary"] = report.summarise(run["curves"])
            write_run(path, run, same=("recipe",))
            print(report.describe(run["summary"]), flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "ppo_learning_cpu")
    add_peer_option(parser)
    parser.add_argument("--run", type=Path, help=f"folder of a run of {RECIPE} with finished stages sft and reward")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=40)
    options = parser.parse_args(arguments)
    check_peer_option(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    measure_or_draw(parse(arguments), "ppo_learning_cpu", measure, report)


if __name__ == "__main__":
    start(main)
