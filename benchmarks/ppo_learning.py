"""Reward against episodes and processor time: this package's PPOTrainer and TRL 1.12.0's, from the same models.

    python benchmarks/ppo_learning.py --peer_python trl-1.12/bin/python    # benchmarks/ppo.py says how to make it
    python benchmarks/ppo_learning.py --draw    # the picture of what has been measured

The lab's SFT and reward models are trained first, by the first two stages of the recipe `tiny-cpu`, or taken from the
folder of such a run with `--run`. Then both sides train the policy with the recipe's settings as far as both have
them, without the pretraining gradient, which the peer does not have. The sides take turns, one iteration each, and
report what they sampled; its reward, the mean score of the same reward model, and the gold labeler's score are taken
here, outside of what is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import torch
from ppo import peer_versions, running
from ppo_learning_report import describe, draw, summarise, table
from ppo_report import OURS, PEER
from ppo_side import POLICY, SCALAR, Job
from rich.console import Console

from instructgpt_hf import pipeline
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.lab import gold_scores
from instructgpt_hf.lab.files import SIZES, rows
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.scoring import score_token_lists

RECIPE = "tiny-cpu"


class Lab:
    """The lab's prompts, SFT model and reward model, in a folder that both sides load.

    Args:
        run: folder of a run of the recipe, whose first two stages are finished.
        folder: gets copies of the two models.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(run / "sft", folder / POLICY)
        shutil.copytree(run / "reward", folder / SCALAR)
        # The peer reads scores without the shift; a constant in rewards and values changes no advantage.
        path = folder / SCALAR / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        self.shift = config["reward_shift"]
        path.write_text(json.dumps({**config, "reward_shift": 0.0}), encoding="utf-8")
        self.tokenizer = load_tokenizer(folder / POLICY)
        self.reward_model = load_reward_model(folder / SCALAR)
        prompt_format = PromptFormat.from_dict(StageArtifact.load(run / "sft").prompt_format)
        texts = [row["prompt"] for row in rows("prompts.train", 0, SIZES["prompts.train"])]
        self.texts = {tuple(prompt_format.prompt_ids(text, self.tokenizer)): text for text in texts}

    def rewards(self, samples: list[list[list[int]]]) -> dict[str, float]:
        """Mean score of the reward model and of the gold labeler.

        Args:
            samples: ids of a prompt and its completion each.
        """
        whole = [prompt + completion for prompt, completion in samples]
        scores = score_token_lists(self.reward_model, whole, self.tokenizer.pad_token_id, 64)
        prompts = [self.texts[tuple(prompt)] for prompt, _ in samples]
        answers = self.tokenizer.batch_decode([completion for _, completion in samples], skip_special_tokens=True)
        gold = gold_scores(prompts, answers)
        return {"reward": sum(scores) / len(scores) - self.shift, "gold": sum(gold) / len(gold)}


def make_job(lab: Lab, seed: int) -> Job:
    """The recipe's settings of stage 3."""
    settings = load_recipe(RECIPE).stages["ppo"].values
    return Job(
        folder=str(lab.folder),
        train="full",
        dtype="float32",
        cuda=False,
        threads=torch.get_num_threads(),
        prompts=[list(prompt) for prompt in lab.texts if len(prompt) <= settings["max_prompt_length"]],
        episodes=settings["generation_batch_size"],
        minibatch=settings["per_device_train_batch_size"],
        micro_batch=settings["per_device_train_batch_size"],
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

    The score of an iteration is that of its samples, taken before its optimizer steps.
    """
    job = make_job(lab, seed)
    points: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    seconds = dict.fromkeys(pythons, 0.0)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(running(name, python, job))[0] for name, python in pythons.items()}
        for iteration in range(iterations):
            for name, side in sides.items():
                found = side.iterate()
                point = {"episodes": iteration * job.episodes, "seconds": seconds[name]}
                point |= {key: found[key] for key in ("kl", "mean_length")} | lab.rewards(found["samples"])
                points[name].append(point)
                seconds[name] += found["processor_seconds"]
    return [{"side": name, "seed": seed, "points": found, "seconds": seconds[name]} for name, found in points.items()]


def measure(options: argparse.Namespace, path: Path) -> None:
    """Curves of every seed, kept in `path` after each, beside those of other seeds."""
    pythons = {PEER: options.peer_python, OURS: sys.executable}
    run = {**common.header(), "peer_versions": peer_versions(options.peer_python), "recipe": RECIPE}
    earlier = [curve for run in common.read_runs(path) if run["recipe"] == RECIPE for curve in run["curves"]]
    run["curves"] = [curve for curve in earlier if curve["seed"] not in options.seeds]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run" if options.run is None else options.run
        if options.run is None:
            for stage in ("sft", "reward"):
                pipeline.run_stage(load_recipe(RECIPE), stage, folder, Console(stderr=True))
        lab = Lab(folder, Path(scratch) / "models")
        run["episodes_per_iteration"] = make_job(lab, 0).episodes
        for seed in options.seeds:
            run["curves"] += curves(pythons, lab, seed, options.iterations)
            run["summary"] = summarise(run["curves"])
            common.write_run(path, run, same=("recipe",))
            print(describe(run["summary"]), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__, "ppo_learning_cpu")
    parser.add_argument("--peer_python", help="Python of an environment with TRL 1.12.0")
    parser.add_argument("--run", type=Path, help=f"folder of a run of {RECIPE} with finished stages sft and reward")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=40)
    options = parser.parse_args(arguments)
    if not options.draw and options.peer_python is None:
        parser.error("--peer_python is needed to measure")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    path = options.output or common.RESULTS / "ppo_learning_cpu.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
