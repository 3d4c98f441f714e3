"""The model and the rankings of benchmarks/overfitting.py."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common.memory import BenchmarkError
from common.models import model_folder, strict_pairs
from datasets import Dataset
from transformers import PreTrainedModel

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import ranking_rows, tokenize_rankings
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model
from setups.lab import lab_rows

HELD_OUT_SHARE = 0.2
Ranking = dict[str, Any]


class Base:
    """The model that every run starts from, whole or its first layers."""

    def __init__(self, model: str, layers: int | None) -> None:
        self.folder = model_folder(model)
        self.label = Path(model).name
        self.layers = layers
        self.tokenizer = load_tokenizer(self.folder)

    def reward_model(self, seed: int) -> PreTrainedModel:
        """A fresh copy with a head of its own seed."""
        cut = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return create_reward_model(self.folder, self.tokenizer, seed=seed, dtype=torch.float32, **cut)


class Rankings:
    """Tokenized rankings to train on, whole and as pairs, and held-out rankings of other prompts.

    Raises:
        BenchmarkError: if there are fewer than an optimizer step takes.
    """

    def __init__(self, options: argparse.Namespace, base: Base) -> None:
        self.label = Path(options.dataset).name
        train, test = lab_sides() if options.dataset == "lab" else file_sides(Path(options.dataset))
        name = options.prompt_template or ("chat" if base.tokenizer.chat_template else "user-assistant")
        self.format = PromptFormat.create(name, base.tokenizer)
        self.train, self.test = (self._tokenize(rows, options, base) for rows in (train, test))
        # Full steps only, so that both arms take as many.
        full = min(options.limit or len(self.train), len(self.train)) // options.prompts * options.prompts
        self.train, self.test = self.train[:full], self.test[: options.test_limit]
        if not self.train:
            raise BenchmarkError(f"{options.dataset}: too few rankings for a step of {options.prompts} prompts")
        self.pairs = as_pairs(self.train)
        self.pairs_per_step = -(-len(self.pairs) // (full // options.prompts))

    def _tokenize(self, rows: Dataset, options: argparse.Namespace, base: Base) -> list[Ranking]:
        rows = ranking_rows(rows, options.dataset)
        return list(tokenize_rankings(rows, self.format, base.tokenizer, options.max_length, options.dataset)[0])

    def summary(self) -> dict[str, Any]:
        """Sizes and prompt format."""
        return {
            "train_prompts": len(self.train),
            "train_completions": sum(len(row["ranks"]) for row in self.train),
            "train_pairs": len(self.pairs),
            "test_prompts": len(self.test),
            "test_pairs": len(as_pairs(self.test)),
            "prompt_template": self.format.name,
        }


def as_pairs(rows: Iterable[Ranking]) -> list[Ranking]:
    """Every strict pair of every ranking as a ranking of two."""
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": list(pair), "ranks": [1, 2]}
        for row in rows
        for pair in strict_pairs(row)
    ]


def lab_sides() -> tuple[Dataset, Dataset]:
    """The lab's rankings to train on, and those of prompts that never occur among them."""
    return Dataset.from_list(lab_rows("rankings.train")), Dataset.from_list(lab_rows("rankings.test"))


def file_sides(path: Path) -> tuple[Dataset, Dataset]:
    """A file's rankings, a fifth of its prompts held out; a prompt that occurs twice is on one side only."""
    rows = ranking_rows(load_split(str(path), "train", role="rankings"), path.name)
    prompts = sorted({str(prompt) for prompt in rows["prompt"]})
    random.Random(0).shuffle(prompts)
    held_out = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(rows["prompt"]):
        sides[str(prompt) in held_out].append(index)
    return rows.select(sides[0]).shuffle(seed=0), rows.select(sides[1])
