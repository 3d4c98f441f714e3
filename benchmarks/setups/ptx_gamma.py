"""What benchmarks/ptx_gamma.py trains and measures on: the lab, or a model folder with two files."""

from __future__ import annotations

import random
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common.training import ADAPTER
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.data.pretraining import pretraining_rows
from instructgpt_hf.data.prompt_rows import prompt_rows
from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.evaluation.likelihood import sequence_kl, text_loss
from instructgpt_hf.evaluation.tasks import exact_match
from instructgpt_hf.lab.files import rows
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, load_reward_model
from instructgpt_hf.models.sampling import sample_completions
from setups.lab import LabRun, lab_rows

HELD_OUT_SHARE = 0.2
BATCH = 64
Ids = list[list[int]]


# Half of the episodes of `tiny-cpu` in an iteration, so that a run takes half a minute.
LAB_SETTINGS = {
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
FILE_SETTINGS = {
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


class Bench(ABC):
    """Models, data and measures; the subclasses provide them."""

    label: str  # name of the run in tables
    settings: dict[str, Any]  # this bench's settings of `PPOConfig`
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    prompts: Dataset  # to train on, column `prompt`
    texts: Dataset  # pretraining text to train on, column `text`
    held_out_prompts: list[Prompt]
    held_out_texts: list[str]
    _start: PreTrainedModel | PeftModel | None = None

    @abstractmethod
    def policy(self) -> PreTrainedModel | PeftModel:
        """A fresh copy of the policy that every run starts from."""

    @abstractmethod
    def reward_and_value(self, seed: int) -> tuple[Any, Any]:
        """The reward, a model or a function, and a fresh value model."""

    @abstractmethod
    def scores(self, prompt_ids: Ids, completion_ids: Ids, texts: list[str]) -> dict[str, float]:
        """Measures of completions of the held-out prompts: `reward`, the one trained on, and others."""

    def tasks(self, policy: PreTrainedModel | PeftModel) -> dict[str, float]:
        """Accuracies on abilities of the base model; none by default."""
        return {}

    def measure(self, policy: PreTrainedModel | PeftModel) -> dict[str, float]:
        """Measures of one policy on held-out prompts, sampled at temperature 1, and on held-out text."""
        policy.eval()
        eos, settings = self.tokenizer.eos_token_id, self.settings
        ids = [self.format.prompt_ids(prompt, self.tokenizer) for prompt in self.held_out_prompts]
        completions = sample_completions(
            policy, self.tokenizer, ids, [eos], settings["max_completion_length"], batch_size=BATCH
        )
        texts = [
            self.format.completion_text(prompt, item, self.tokenizer)
            for prompt, item in zip(self.held_out_prompts, completions, strict=True)
        ]
        if self._start is None:
            self._start = self.policy().eval()
        return {
            **self.scores(ids, completions, texts),
            "kl": sequence_kl(policy, self._start, ids, completions, BATCH).value,
            "text_loss": text_loss(policy, self.tokenizer, self.held_out_texts, settings["ptx_max_length"], BATCH),
            "mean_length": statistics.fmean(map(len, completions)),
            "eos_rate": statistics.fmean(item[-1] == eos for item in completions),
            **self.tasks(policy),
        }


class LabBench(Bench):
    """The lab with the SFT and reward models of a finished `tiny-cpu` run."""

    label = "lab"
    settings = LAB_SETTINGS

    def __init__(self, run: Path, held_out: int) -> None:
        self.run = LabRun(run)
        self.tokenizer, self.format = self.run.tokenizer, self.run.format
        self.prompts = Dataset.from_list(lab_rows("prompts.train"))
        self.texts = Dataset.from_list(lab_rows("pretraining.train"))
        self.held_out_prompts = [row["prompt"] for row in rows("prompts.test", 0, held_out)]
        self.held_out_texts = [row["text"] for row in lab_rows("pretraining.test")]

    def policy(self) -> PreTrainedModel:
        return load_policy(self.run.sft, self.tokenizer)

    def reward_and_value(self, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
        return load_reward_model(self.run.reward), load_reward_model(self.run.reward, trainable=True)

    def scores(self, prompt_ids: Ids, completion_ids: Ids, texts: list[str]) -> dict[str, float]:
        reward, gold = self.run.rewards(prompt_ids, completion_ids, self.held_out_prompts, texts)
        return {"reward": reward, "gold_score": gold}

    def tasks(self, policy: PreTrainedModel | PeftModel) -> dict[str, float]:
        return {"task_accuracy": exact_match(policy, self.tokenizer, lab_rows("tasks.test"))[0].value}


class FileBench(Bench):
    """A model folder with adapters on all linear layers, a file of prompts and one of text.

    The reward is `plain_words`, so no reward model is needed; the value model is the same model with a fresh head, cut
    to its first layers to be cheap. Prompts are rendered without the chat template, whose system prompt is longer than
    they are. A fifth of both files is held out.
    """

    settings = FILE_SETTINGS

    def __init__(self, model: Path, prompts: Path, text: Path, held_out: int, value_layers: int | None) -> None:
        self.folder, self.label, self.value_layers = model, model.name, value_layers
        self.tokenizer = load_tokenizer(model)
        self.format = PromptFormat.create("user-assistant", self.tokenizer)
        longest = self.settings["max_prompt_length"]
        kept, _ = prompt_rows(
            load_split(str(prompts), "train", role="prompts"), self.format, self.tokenizer, longest, prompts.name
        )
        self.prompts, test = _sides(kept.select_columns(["prompt"]))
        self.held_out_prompts = list(test["prompt"])[:held_out]
        self.texts, test = _sides(pretraining_rows(load_split(str(text), "train", role="pretraining"), text.name))
        self.held_out_texts = list(test["text"])[:held_out]

    def policy(self) -> PeftModel:
        torch.manual_seed(0)
        adapter = LoraConfig(task_type="CAUSAL_LM", **ADAPTER)
        return load_policy(self.folder, self.tokenizer, peft_config=adapter, dtype=torch.bfloat16)

    def reward_and_value(self, seed: int) -> tuple[Any, PeftModel]:
        cut = {} if self.value_layers is None else {"num_hidden_layers": self.value_layers}
        value = create_reward_model(self.folder, self.tokenizer, seed=seed, dtype=torch.bfloat16, **cut)
        return plain_words, get_peft_model(
            value, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **ADAPTER)
        )

    def scores(self, prompt_ids: Ids, completion_ids: Ids, texts: list[str]) -> dict[str, float]:
        return {"reward": statistics.fmean(plain_words(texts))}


def plain_words(completions: Sequence[Prompt], **_: Any) -> list[float]:
    """Minus the mean number of letters of a completion's words: a reward for short words. -12 without any word."""
    rewards = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        words = ["".join(filter(str.isalpha, word)) for word in text.split()]
        sizes = [len(word) for word in words if word]
        rewards.append(-statistics.fmean(sizes) if sizes else -12.0)
    return rewards


def _sides(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows held out, in random order."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    held_out = max(1, round(HELD_OUT_SHARE * len(order)))
    return rows.select(order[held_out:]), rows.select(order[:held_out])
