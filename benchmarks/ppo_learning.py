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
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common.report import BLUE, ORANGE, Run, figure, interval, legend_below, markdown
from common.results import header, paired, read_runs, write_run
from common.script import command_line, measure_or_draw, start
from matplotlib.axes import Axes
from ppo import NAMES
from rich.console import Console
from setups.lab import RECIPE, LabRun, lab_rows
from sides.job import OURS, PEER, POLICY, SCALAR, Job
from sides.running import both_pythons, peer_versions, running

from instructgpt_hf import pipeline
from instructgpt_hf.config.recipe import load_recipe

# The end of a curve is the mean of this many iterations.
LAST = 5
MEASURES = {"reward": "reward model's score", "gold": "gold labeler's score", "kl": "KL to SFT, nats"}
_SIDES = {**NAMES, "ours_minus_trl": "difference"}
_STYLES = {PEER: (ORANGE, "--"), OURS: (BLUE, "-")}
_PANELS = (
    ("episodes", "reward", "Reward by episodes", "episodes"),
    ("seconds", "reward", "Reward by time", "seconds of processor time"),
    ("episodes", "gold", "Gold labeler's score", "episodes"),
)


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
    pythons = both_pythons(options.peer_python)
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
            run["summary"] = summarise(run["curves"])
            write_run(path, run, same=("recipe",))
            print(table([run]), flush=True)


def summarise(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Both sides' ends of their curves, as `paired` gives them, and `times_faster` by seed."""
    ends = {
        (curve["side"], curve["seed"]): {
            **{name: statistics.fmean(point[name] for point in curve["points"][-LAST:]) for name in MEASURES},
            "seconds": curve["seconds"],
        }
        for curve in curves
    }
    summary = paired(ends, PEER, OURS, list(MEASURES))
    seconds = {arm: [ends[arm, seed]["seconds"] for seed in summary["seeds"]] for arm in NAMES}
    return {**summary, "times_faster": [peer / ours for peer, ours in zip(*seconds.values(), strict=True)]}


def table(runs: list[Run]) -> str:
    """The table of the documentation: means over seeds with 95 % intervals."""
    rows = []
    for summary in (run["summary"] for run in runs):
        rows += [[MEASURES[name], *(interval(summary[side][name], ".2f") for side in _SIDES)] for name in MEASURES]
        seconds = [f"{summary[side]['seconds']['mean']:.0f} s" for side in NAMES]
        faster = summary["times_faster"]
        rows.append(["processor time", *seconds, f"{min(faster):.2f} to {max(faster):.2f} times faster"])
    return markdown([f"mean of the last {LAST} iterations", *_SIDES.values()], rows)


def draw(runs: list[Run], chart: Path) -> None:
    """Reward and gold score of the last run, by episodes and by time."""
    with figure(chart, 12.6, 3.8) as made:
        panels = made.subplots(1, len(_PANELS))
        for axes, panel in zip(panels, _PANELS, strict=True):
            _draw_panel(axes, *panel, runs[-1]["curves"])
        legend_below(made, panels[0])


def _draw_panel(axes: Axes, place: str, measure: str, title: str, unit: str, curves: list[dict[str, Any]]) -> None:
    """Every seed as a thin line, and the mean over seeds, at the mean place, as a thick one."""
    for side, (color, style) in _STYLES.items():
        lines = [
            [[point[name] for point in curve["points"]] for name in (place, measure)]
            for curve in curves
            if curve["side"] == side
        ]
        for line in lines:
            axes.plot(*line, style, color=color, alpha=0.3, linewidth=1)
        means = [[statistics.fmean(values) for values in zip(*same, strict=True)] for same in zip(*lines, strict=True)]
        axes.plot(*means, style, color=color, linewidth=2, label=NAMES[side])
    axes.set_title(title)
    axes.set_xlabel(unit)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "ppo_learning_cpu")
    parser.add_argument("--peer_python", help="Python of an environment with TRL 1.12.0")
    parser.add_argument("--run", type=Path, help=f"folder of a run of {RECIPE} with finished stages sft and reward")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=40)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    measure_or_draw(parse(arguments), "ppo_learning_cpu", measure, draw, table)


if __name__ == "__main__":
    start(main)
