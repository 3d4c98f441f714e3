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
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from common import BenchmarkError
from datasets import Dataset
from overfitting_report import ARMS, MEASURES, PAIRS, RANKINGS, describe, draw, table
from transformers import EvalPrediction, PrinterCallback, TrainerCallback

from instructgpt_hf import lab
from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import ranking_rows, tokenize_rankings
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.functional.ranking import pairwise_accuracy
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model
from instructgpt_hf.trainers.reward import RewardTrainer

HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Run:
    """One arm at one learning rate from one seed."""

    arm: str
    learning_rate: float
    seed: int


class Curve(TrainerCallback):
    """Evaluates and logs at equal parts of every pass, whatever its number of steps."""

    def __init__(self, steps: int, passes: int, points: int) -> None:
        self.steps = steps
        self.places = {round(steps * place / points) for place in range(1, points * passes + 1)}
        self.points: list[dict[str, float]] = []
        self._training: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_evaluate = state.global_step in self.places

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._training = logs.get("loss", self._training)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        point = {"pass": state.global_step / self.steps, "step": state.global_step}
        if self._training is not None:
            point["training_loss"] = self._training
        self.points.append(
            {**point, "held_out_loss": metrics["eval_loss"], "held_out_accuracy": metrics["eval_accuracy"]}
        )


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of strict pairs of all held-out prompts that are ordered right; equal scores count one half."""
    right = pairs = 0.0
    for scores, ranks in zip(found.predictions, found.label_ids, strict=True):
        correct, count = pairwise_accuracy(
            torch.tensor(scores), torch.tensor(ranks), torch.zeros(len(ranks), dtype=torch.long)
        )
        right, pairs = right + correct.sum().item(), pairs + count.sum().item()
    return {"accuracy": right / pairs}


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every strict pair of every ranking as a ranking of two."""
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": [row["completion_ids"][better], row["completion_ids"][worse]],
            "ranks": [1, 2],
        }
        for row in rows
        for better, worse in itertools.permutations(range(len(row["ranks"])), 2)
        if row["ranks"][better] < row["ranks"][worse]
    ]


def train(run: Run, options: argparse.Namespace, base: Base, data: Data) -> list[dict[str, float]]:
    """The points of one run's curve."""
    rows, batch = (data.train, options.prompts) if run.arm == RANKINGS else (data.pairs, data.pairs_per_step)
    steps = -(-len(rows) // batch)
    model = base.reward_model(run.seed)
    curve = Curve(steps, options.passes, options.points)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            output_dir=folder,
            learning_rate=run.learning_rate,
            lr_scheduler_type="constant",
            num_train_epochs=options.passes,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=256,
            max_tokens_per_forward=options.max_tokens_per_forward,
            seed=run.seed,
            use_cpu=common.device_name() == "cpu",
            bf16=False,
            eval_on_start=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
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


class Base:
    """The model that every run starts from, whole or its first layers."""

    def __init__(self, model: str, layers: int | None) -> None:
        self.folder = lab.base_model_path() if model == "lab" else Path(model)
        self.label = "lab" if model == "lab" else self.folder.name
        self.layers = layers
        self.tokenizer = load_tokenizer(self.folder)

    def reward_model(self, seed: int) -> Any:
        """A fresh copy with a head of its own seed."""
        cut = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return create_reward_model(self.folder, self.tokenizer, seed=seed, dtype=torch.float32, **cut)


class Data:
    """Tokenized rankings to train on, as they are and as pairs, and those of other prompts to measure on."""

    def __init__(self, options: argparse.Namespace, base: Base) -> None:
        train, test = lab_rows() if options.dataset == "lab" else file_rows(Path(options.dataset))
        name = options.prompt_template or ("chat" if base.tokenizer.chat_template else "user-assistant")
        self.format = PromptFormat.create(name, base.tokenizer)
        self.train, self.test = (self._tokens(rows, options, base) for rows in (train, test))
        # Full steps only, so that both arms take as many.
        full = min(options.limit or len(self.train), len(self.train)) // options.prompts * options.prompts
        self.train, self.test = self.train[:full], self.test[: options.test_limit]
        if not self.train:
            raise BenchmarkError(f"{options.dataset}: too few rankings for a step of {options.prompts} prompts")
        self.pairs = as_pairs(self.train)
        self.pairs_per_step = -(-len(self.pairs) // (full // options.prompts))

    def _tokens(self, rows: Dataset, options: argparse.Namespace, base: Base) -> list[dict[str, Any]]:
        rows = ranking_rows(rows, options.dataset)
        return list(tokenize_rankings(rows, self.format, base.tokenizer, options.max_length, options.dataset)[0])

    def summary(self) -> dict[str, Any]:
        """Sizes."""
        return {
            "train_prompts": len(self.train),
            "train_completions": sum(len(row["ranks"]) for row in self.train),
            "train_pairs": len(self.pairs),
            "test_prompts": len(self.test),
            "test_pairs": len(as_pairs(self.test)),
            "prompt_template": self.format.name,
        }


def lab_rows() -> tuple[Dataset, Dataset]:
    """The lab's rankings and those of prompts that never occur among them."""
    from instructgpt_hf.lab.files import SIZES, rows

    train, test = (Dataset.from_list(rows(name, 0, SIZES[name])) for name in ("rankings.train", "rankings.test"))
    return train, test


def file_rows(path: Path) -> tuple[Dataset, Dataset]:
    """A file's rankings, a fifth of its prompts held out; a prompt that occurs twice is on one side only."""
    rows = ranking_rows(load_split(str(path), "train", role="rankings"), path.name)
    prompts = sorted({str(prompt) for prompt in rows["prompt"]})
    random.Random(0).shuffle(prompts)
    held_out = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(rows["prompt"]):
        sides[str(prompt) in held_out].append(index)
    train, test = (rows.select(indices) for indices in sides)
    return train.shuffle(seed=0), test


def at_pass(points: list[dict[str, float]], number: int) -> dict[str, float]:
    """What one run shows at the end of a pass.

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
    found = []
    for rate, number in itertools.product(sorted({curve["learning_rate"] for curve in curves}), range(1, passes + 1)):
        ends = {
            (curve["arm"], curve["seed"]): at_pass(curve["points"], number)
            for curve in curves
            if curve["learning_rate"] == rate
        }
        seeds = sorted({seed for _, seed in ends if {(arm, seed) for arm in ARMS} <= ends.keys()})
        if not seeds:
            continue
        entry: dict[str, Any] = {"learning_rate": rate, "pass": number, "seeds": seeds}
        for arm in ARMS:
            entry[arm] = {name: common.mean_interval([ends[arm, seed][name] for seed in seeds]) for name in MEASURES}
        entry["pairs_minus_rankings"] = {
            name: common.mean_interval([ends[PAIRS, seed][name] - ends[RANKINGS, seed][name] for seed in seeds])
            for name in MEASURES
        }
        found.append(entry)
    return found


def measure(options: argparse.Namespace, path: Path) -> None:
    """Train every arm from every seed at every learning rate; `path` holds what is done after each run.

    Curves of other seeds and rates stay, if the file has some with the same data and settings.
    """
    base = Base(options.model, options.layers)
    data = Data(options, base)
    run: dict[str, Any] = {
        **common.header(),
        "dataset": "lab" if options.dataset == "lab" else Path(options.dataset).name,
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
    same = ("dataset", "model", "layers", "data", "settings")
    for earlier in common.read_runs(path):
        if all(earlier[name] == run[name] for name in same):
            new = set(itertools.product(options.seeds, options.learning_rates))
            run["curves"] = [item for item in earlier["curves"] if (item["seed"], item["learning_rate"]) not in new]
            run["command"] = f"{earlier['command']}; {run['command']}" if run["curves"] else run["command"]
    print(f"{run['data']}, {options.prompts} rankings or {data.pairs_per_step} pairs a step", flush=True)
    for seed, rate, arm in itertools.product(options.seeds, options.learning_rates, ARMS):
        started = time.perf_counter()
        points = train(Run(arm, rate, seed), options, base, data)
        gc.collect()
        run["curves"].append({"arm": arm, "learning_rate": rate, "seed": seed, "points": points})
        run["summary"] = summarise(run["curves"], options.passes)
        common.write_run(path, run, same=("dataset", "model", "layers"))
        end = at_pass(points, 1)
        print(
            f"seed {seed}, learning rate {rate:g}, {arm}: held-out loss {end['held_out_loss']:.4f}, accuracy "
            f"{end['held_out_accuracy']:.3f} after one pass; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    for entry in run["summary"]:
        print(describe(entry))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__, "overfitting_<dataset>")
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


def main(arguments: list[str] | None = None) -> None:
    """Measure or draw."""
    options = parse(arguments)
    path = options.output or common.RESULTS / f"overfitting_{Path(options.dataset).stem}.json"
    common.measure_or_draw(options, path, measure, draw, table)


if __name__ == "__main__":
    common.start(main)
