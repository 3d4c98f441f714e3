"""Does shuffling pairs overfit where whole rankings do not? (InstructGPT, section 3.5)

    python benchmarks/overfitting.py                                     # the lab
    python benchmarks/overfitting.py --dataset rankings.jsonl --model ../smollm2 --layers 6 --learning_rates 2e-5
    python benchmarks/overfitting.py --draw                              # the picture of the lab's run

The paper reports that one pass over comparisons shuffled into a single dataset overfits the reward model, that all
pairs of a prompt as one batch element do not, and that a second pass does (C.2). Two arms start from the same model
with the same head and take the same number of optimizer steps per pass, at the same constant learning rate, on the
same pairs:

- rankings: N prompts a step, each with all of its pairs, so a completion is in one step of a pass;
- pairs: all pairs of all prompts, shuffled, as many a step as N rankings hold on average, so a completion is in up to
  K-1 steps of a pass.

Both run through this package's trainer: a pair is a ranking of two, whose loss and gradient equal TRL's. The first arm
weighs prompts equally, as the paper does, and the second pairs. The rate is constant, so that the end of the first of
two passes is also the end of a run of one pass. Held out are whole prompts; both arms are measured on them by the mean
over prompts of the mean loss of their pairs, and by the share of pairs ordered right. The training loss is that of the
steps since the last point, each before its update.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.report import BLUE, GREY, ORANGE, Run, figure, interval, legend_below, markdown
from common.results import header, mean_interval, paired, read_runs, write_run
from common.script import command_line, device_name, measure_or_draw, start
from common.training import training_settings
from datasets import Dataset
from matplotlib.axes import Axes
from setups.overfitting import Base, Rankings
from transformers import EvalPrediction, PrinterCallback, TrainerCallback

from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.evaluation.reward_model.pairs import Rankings as RankingTable
from instructgpt_hf.trainers.reward import RewardTrainer

Points = list[dict[str, float]]

RANKINGS, PAIRS = "rankings", "pairs"
ARMS = {RANKINGS: "a prompt's pairs together", PAIRS: "pairs shuffled"}
# Compared at the end of a pass.
MEASURES = ("held_out_loss", "held_out_accuracy", "training_loss", "gap", "rise")
_PARTS = {**ARMS, "pairs_minus_rankings": "difference"}
_PANELS = (
    ("training_loss", "Training loss", "nats per pair"),
    ("held_out_loss", "Held-out loss", "nats per pair"),
    ("held_out_accuracy", "Held-out accuracy", "pairs ordered right"),
)
_STYLES = {RANKINGS: (BLUE, "-"), PAIRS: (ORANGE, "--")}


class Curve(TrainerCallback):
    """Evaluates and logs at equal parts of every pass, whatever its number of steps."""

    def __init__(self, steps: int, passes: int, points: int) -> None:
        self.steps = steps
        self.places = {round(steps * place / points) for place in range(1, points * passes + 1)}
        self.points: Points = []
        self._training: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_evaluate = state.global_step in self.places

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._training = logs.get("loss", self._training)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        point = {"pass": state.global_step / self.steps, "step": state.global_step}
        if self._training is not None:
            point["training_loss"] = self._training
        held_out = {f"held_out_{name}": metrics[f"eval_{name}"] for name in ("loss", "accuracy")}
        self.points.append({**point, **held_out})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of strict pairs of all held-out prompts that are ordered right; equal scores count one half."""
    table = RankingTable.read("held-out rankings", prediction.predictions, prediction.label_ids)
    return {"accuracy": float(table.points(table.scores)[table.strict].mean())}


def train(arm: str, rate: float, seed: int, options: argparse.Namespace, base: Base, data: Rankings) -> Points:
    """The curve of one arm at one learning rate from one seed."""
    rows, batch = (data.train, options.prompts) if arm == RANKINGS else (data.pairs, data.pairs_per_step)
    curve = Curve(-(-len(rows) // batch), options.passes, options.points)
    model = base.reward_model(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            **training_settings(folder, device_name() == "cuda"),
            learning_rate=rate,
            num_train_epochs=options.passes,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=256,
            max_tokens_per_forward=options.max_tokens_per_forward,
            seed=seed,
            bf16=False,
            eval_on_start=True,
            logging_strategy="no",
        )
        trainer = RewardTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(data.test),
            processing_class=base.tokenizer,
            compute_metrics=accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(curve)
        trainer.train()
    return curve.points


def at_pass(points: Points, number: int) -> dict[str, float]:
    """One run's measures at the end of a pass.

    `gap` is held-out minus training loss, `rise` how far the held-out loss is above its least so far.
    """
    until = [point for point in points if point["pass"] <= number + 1e-9]
    last = until[-1]
    return {
        **{name: last[name] for name in ("held_out_loss", "held_out_accuracy", "training_loss")},
        "gap": last["held_out_loss"] - last["training_loss"],
        "rise": last["held_out_loss"] - min(point["held_out_loss"] for point in until),
    }


def summarise(curves: list[dict[str, Any]], passes: int) -> list[dict[str, Any]]:
    """Means and 95 % intervals over seeds, by learning rate and pass: each arm, and pairs minus rankings by seed."""
    summary = []
    for rate, number in itertools.product(sorted({curve["learning_rate"] for curve in curves}), range(1, passes + 1)):
        same_rate = [curve for curve in curves if curve["learning_rate"] == rate]
        ends = {(curve["arm"], curve["seed"]): at_pass(curve["points"], number) for curve in same_rate}
        entry = {"learning_rate": rate, "pass": number, **paired(ends, RANKINGS, PAIRS, MEASURES)}
        if entry["seeds"]:
            summary.append(entry)
    return summary


def new_run(options: argparse.Namespace, base: Base, data: Rankings, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's settings, with the curves of other seeds and rates of an earlier run with the same settings."""
    run: dict[str, Any] = {
        **header(),
        "dataset": data.label,
        "model": base.label,
        "layers": options.layers,
        "data": data.summary(),
        "settings": {
            "prompts_per_step": options.prompts,
            "pairs_per_step": data.pairs_per_step,
            "passes": options.passes,
            "schedule": "constant",
            "max_length": options.max_length,
            "dtype": "float32",
        },
        "curves": [],
    }
    new = set(itertools.product(options.seeds, options.learning_rates))
    for other in earlier:
        if all(other[name] == run[name] for name in ("dataset", "model", "layers", "data", "settings")):
            run["curves"] = [item for item in other["curves"] if (item["seed"], item["learning_rate"]) not in new]
            run["command"] = f"{other['command']}; {run['command']}" if run["curves"] else run["command"]
    return run


def measure(options: argparse.Namespace, path: Path) -> None:
    """Train every arm from every seed at every learning rate; `path` has the finished ones after each."""
    base = Base(options.model, options.layers)
    data = Rankings(options, base)
    run = new_run(options, base, data, read_runs(path))
    print(f"{run['data']}, {options.prompts} rankings or {data.pairs_per_step} pairs a step", flush=True)
    for seed, rate, arm in itertools.product(options.seeds, options.learning_rates, ARMS):
        started = time.perf_counter()
        points = train(arm, rate, seed, options, base, data)
        gc.collect()
        run["curves"].append({"arm": arm, "learning_rate": rate, "seed": seed, "points": points})
        run["summary"] = summarise(run["curves"], options.passes)
        write_run(path, run, same=("dataset", "model", "layers"))
        end = at_pass(points, 1)
        print(
            f"seed {seed}, learning rate {rate:g}, {arm}: held-out loss {end['held_out_loss']:.4f}, accuracy "
            f"{end['held_out_accuracy']:.3f} after one pass; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    print(table([run]))


def table(runs: list[Run]) -> str:
    """The table of the documentation: means over seeds with 95 % intervals."""
    rows = []
    for run in runs:
        layers = "" if run["layers"] is None else f", first {run['layers']} layers"
        title = f"{run['dataset']}, {run['model']}{layers}"
        for entry, name in itertools.product(run["summary"], MEASURES):
            values = [interval(entry[part][name], ".3f") for part in _PARTS]
            rows.append([title, f"{entry['learning_rate']:g}", f"{entry['pass']}", name.replace("_", " "), *values])
    return markdown(["rankings, model", "learning rate", "after pass", "measure", *_PARTS.values()], rows)


def draw(runs: list[Run], chart: Path) -> None:
    """Curves of the last run; one line of panels for each learning rate."""
    curves, passes = runs[-1]["curves"], runs[-1]["settings"]["passes"]
    rates = sorted({curve["learning_rate"] for curve in curves})
    with figure(chart, 12.6, 0.5 + 3.1 * len(rates)) as made:
        grid = made.subplots(len(rates), len(_PANELS), squeeze=False)
        for line, rate in zip(grid, rates, strict=True):
            same_rate = [curve for curve in curves if curve["learning_rate"] == rate]
            for axes, (key, title, unit) in zip(line, _PANELS, strict=True):
                _draw_panel(axes, key, same_rate, passes)
                axes.set_title(f"{title}, learning rate {rate:g}" if len(rates) > 1 else title)
                axes.set_ylabel(unit)
        legend_below(made, grid[0][0])


def _draw_panel(axes: Axes, key: str, curves: list[dict[str, Any]], passes: int) -> None:
    """Every seed as a thin line, the mean over seeds as a thick one within its 95 % interval."""
    for arm, (color, style) in _STYLES.items():
        lines = [[(p["pass"], p[key]) for p in curve["points"] if key in p] for curve in curves if curve["arm"] == arm]
        if not lines:
            continue
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, linestyle=style, linewidth=0.8, alpha=0.3)
        places = [place for place, _ in lines[0]]
        intervals = [mean_interval([line[index][1] for line in lines]) for index in range(len(places))]
        mean, low, high = ([item[end] for item in intervals] for end in ("mean", "low", "high"))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(places, mean, color=color, linestyle=style, linewidth=2, label=ARMS[arm])
    for number in range(1, passes):
        axes.axvline(number, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel("passes over the rankings")
    axes.grid(axis="x", visible=False)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "overfitting_<dataset>")
    parser.add_argument("--dataset", default="lab", help="lab (default), or a file of rankings")
    parser.add_argument("--model", default="lab", help="lab (default: the lab's base model), or a model folder")
    parser.add_argument("--layers", type=int, help="keep only the model's first layers")
    parser.add_argument("--prompt_template", help="chat if the tokenizer has a chat template, else user-assistant")
    parser.add_argument("--max_length", type=int, default=256, help="longest prompt + completion, in tokens")
    parser.add_argument("--limit", type=int, help="rankings to train on; all by default")
    parser.add_argument("--test_limit", type=int, help="held-out rankings; all by default")
    parser.add_argument("--prompts", type=int, default=16, help="rankings per optimizer step")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4], help="each for both arms")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--points", type=int, default=10, help="measurements per pass")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of head and order")
    parser.add_argument("--max_tokens_per_forward", type=int, default=4096)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    measure_or_draw(options, f"overfitting_{Path(options.dataset).stem}", measure, draw, table)


if __name__ == "__main__":
    start(main)
