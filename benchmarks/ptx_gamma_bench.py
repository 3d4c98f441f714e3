"""What benchmarks/ptx_gamma.py trains and measures on: the lab, or a model folder with two files."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from instructgpt_hf import lab
from instructgpt_hf.data.pretraining import pretraining_rows
from instructgpt_hf.data.prompts import PromptFormat, prompt_rows
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.evaluation.likelihood import sequence_kl, text_loss
from instructgpt_hf.evaluation.tasks import exact_match
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, load_reward_model
from instructgpt_hf.models.sampling import sample_completions
from instructgpt_hf.models.scoring import score_token_lists

HELD_OUT_SHARE = 0.2
BATCH = 64


class Bench:
    """Models, data and measures; the subclasses say where they come from.

    Attributes:
        label: name of the run in tables.
        settings: those of `PPOConfig` that belong to this bench.
        prompts: to train on, column `prompt`.
        texts: pretraining text to train on, column `text`.
        held_out_prompts: to measure on.
        held_out_texts: the same.
    """

    label: str
    settings: dict[str, Any]
    prompts: Dataset
    texts: Dataset
    held_out_prompts: list[Any]
    held_out_texts: list[str]

    def __init__(self, folder: Path, template: str) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.format = PromptFormat.create(template, self.tokenizer)
        self._start: Any = None

    def policy(self) -> Any:
        """A fresh copy of the policy that every run starts from."""
        raise NotImplementedError

    def reward_and_value(self, seed: int) -> tuple[Any, Any]:
        """The reward, a model or a function, and a fresh value model."""
        raise NotImplementedError

    def scores(self, ids: list[list[int]], answers: list[list[int]], texts: list[str]) -> dict[str, float]:
        """Measures of answers to the held-out prompts: `reward`, the one trained on, and others."""
        raise NotImplementedError

    def measure(self, policy: Any) -> dict[str, float]:
        """One policy on held-out prompts, sampled at temperature 1, and on held-out text."""
        policy.eval()
        ids = [self.format.prompt_ids(prompt, self.tokenizer) for prompt in self.held_out_prompts]
        answers = sample_completions(
            policy,
            self.tokenizer,
            ids,
            [self.tokenizer.eos_token_id],
            self.settings["max_completion_length"],
            batch_size=BATCH,
        )
        texts = [self.format.completion_text(item, self.tokenizer) for item in answers]
        if self._start is None:
            self._start = self.policy().eval()
        return {
            **self.scores(ids, answers, texts),
            "kl": sequence_kl(policy, self._start, ids, answers, BATCH).value,
            "text_loss": text_loss(
                policy, self.tokenizer, self.held_out_texts, self.settings["ptx_max_length"], BATCH
            ),
            "mean_length": statistics.fmean(map(len, answers)),
            "eos_rate": statistics.fmean(item[-1] == self.tokenizer.eos_token_id for item in answers),
            **self.tasks(policy),
        }

    def tasks(self, policy: Any) -> dict[str, float]:
        """Accuracies on what the base model could do; none by default."""
        return {}


class LabBench(Bench):
    """The lab with the SFT and reward models of a finished `tiny-cpu` run.

    The settings are that recipe's with half its episodes an iteration, so that a run takes half a minute.
    """

    def __init__(self, run: Path, held_out: int) -> None:
        sft, self.reward = run / "sft", run / "reward"
        for stage in (sft, self.reward):
            if not (stage / "stage.json").is_file():
                raise BenchmarkError(
                    f"{stage}: no finished stage; `instructgpt-hf sft --config tiny-cpu --output_dir {run}` and the "
                    "same with `reward` make both"
                )
        super().__init__(sft, json.loads((sft / "stage.json").read_text(encoding="utf-8"))["prompt_format"]["name"])
        from instructgpt_hf.lab.files import SIZES, rows

        self.label = "lab"
        self.settings = {
            "generation_batch_size": 64,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "max_completion_length": 40,
            "ptx_max_length": 64,
            "ptx_episodes_ratio": 1,
            "learning_rate": 5e-4,
            "value_learning_rate": 5e-4,
            "beta": 0.1,
            "warmup_iterations": 3,
        }
        self.prompts, self.texts = (
            Dataset.from_list(rows(name, 0, SIZES[name])) for name in ("prompts.train", "pretraining.train")
        )
        self.held_out_prompts = [row["prompt"] for row in rows("prompts.test", 0, held_out)]
        self.held_out_texts = [row["text"] for row in rows("pretraining.test", 0, SIZES["pretraining.test"])]
        self._tasks = rows("tasks.test", 0, SIZES["tasks.test"])
        self._judge = load_reward_model(self.reward)

    def policy(self) -> Any:
        return load_policy(self.folder, self.tokenizer)

    def reward_and_value(self, seed: int) -> tuple[Any, Any]:
        return load_reward_model(self.reward), load_reward_model(self.reward, trainable=True)

    def scores(self, ids: list[list[int]], answers: list[list[int]], texts: list[str]) -> dict[str, float]:
        whole = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
        rewards = score_token_lists(self._judge, whole, self.tokenizer.pad_token_id, BATCH)
        gold = lab.gold_scores(self.held_out_prompts, texts)
        return {"reward": statistics.fmean(rewards), "gold_score": statistics.fmean(gold)}

    def tasks(self, policy: Any) -> dict[str, float]:
        return {"task_accuracy": exact_match(policy, self.tokenizer, self._tasks)[0].value}


def plain_words(completions: Sequence[Any], **_: Any) -> list[float]:
    """Minus the mean number of letters of an answer's words: a reward for short words. -12 without any word."""
    found = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        words = ["".join(filter(str.isalpha, word)) for word in text.split()]
        sizes = [len(word) for word in words if word]
        found.append(-statistics.fmean(sizes) if sizes else -12.0)
    return found


class FileBench(Bench):
    """A model folder with adapters on all linear layers, a file of prompts and one of text.

    The reward is `plain_words`, so no reward model is needed; the value model is the same model with a fresh head, cut
    to its first layers to be cheap. Prompts are rendered without the chat template, whose system prompt is longer than
    they are. A fifth of both files is held out.
    """

    def __init__(self, model: Path, prompts: Path, text: Path, held_out: int, value_layers: int | None) -> None:
        tokenizer = load_tokenizer(model)
        super().__init__(model, "user-assistant")
        self.label, self.value_layers = model.name, value_layers
        self.settings = {
            "generation_batch_size": 16,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 16,
            "max_completion_length": 16,
            "max_prompt_length": 24,
            "ptx_max_length": 32,
            "ptx_episodes_ratio": 1,
            "learning_rate": 2e-3,
            "value_learning_rate": 2e-3,
            "beta": 0.02,
            "warmup_iterations": 2,
        }
        rows = load_split(str(prompts), "train", role="prompts")
        kept, _ = prompt_rows(rows, self.format, tokenizer, self.settings["max_prompt_length"], prompts.name)
        train, test = _sides(kept.select_columns(["prompt"]))
        self.prompts, self.held_out_prompts = train, list(test["prompt"])[:held_out]
        train, test = _sides(pretraining_rows(load_split(str(text), "train", role="pretraining"), text.name))
        self.texts, self.held_out_texts = train, list(test["text"])[:held_out]

    def policy(self) -> Any:
        torch.manual_seed(0)
        return load_policy(self.folder, self.tokenizer, peft_config=_adapter("CAUSAL_LM"), dtype=torch.bfloat16)

    def reward_and_value(self, seed: int) -> tuple[Any, Any]:
        cut = {} if self.value_layers is None else {"num_hidden_layers": self.value_layers}
        value = create_reward_model(self.folder, self.tokenizer, seed=seed, dtype=torch.bfloat16, **cut)
        return plain_words, get_peft_model(value, _adapter("SEQ_CLS"))

    def scores(self, ids: list[list[int]], answers: list[list[int]], texts: list[str]) -> dict[str, float]:
        return {"reward": statistics.fmean(plain_words(texts))}


def _adapter(task_type: str) -> LoraConfig:
    saved = ["score"] if task_type == "SEQ_CLS" else None
    return LoraConfig(task_type=task_type, r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=saved)


def _sides(rows: Dataset) -> tuple[Dataset, Dataset]:
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    held_out = max(1, round(HELD_OUT_SHARE * len(order)))
    return rows.select(order[held_out:]), rows.select(order[:held_out])
