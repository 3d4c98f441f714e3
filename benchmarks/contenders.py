"""The contenders of benchmarks/reward_model.py: one model, one optimizer step's rankings, three trainers."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import trl
from common import BenchmarkError
from datasets import Dataset
from peft import LoraConfig
from ppo_models import ADAPTER
from ppo_side import model_options
from reward_model_report import PER_COMPLETION, TRL
from transformers import PrinterCallback, TrainerCallback

from instructgpt_hf import lab
from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model
from instructgpt_hf.trainers.reward import RewardTrainer


@dataclass(frozen=True)
class Case:
    """Rankings of one shape: K completions of `completion` tokens (with EOS) for each of `prompts` prompts."""

    completions: int
    prompt: int
    completion: int
    prompts: int

    @property
    def pairs(self) -> int:
        """Pairs of one optimizer step."""
        return self.prompts * math.comb(self.completions, 2)

    def pass_tokens(self, micro_batch: int) -> int:
        """Tokens in a forward pass of `micro_batch` pairs."""
        return 2 * micro_batch * (self.prompt + self.completion)

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step's rankings, each counted once."""
        return self.prompts * (self.prompt + self.completions * self.completion)


@dataclass(frozen=True)
class Setup:
    """What all contenders and cases have in common; `train` is full or qlora."""

    model: str
    train: str
    dtype: str
    cuda: bool
    threads: int
    attention: str = "sdpa"


class Watch(TrainerCallback):
    """Times a call of `train()`, counts the tokens that the model computes, and keeps the last step's gradient."""

    def __init__(self, model: Any, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds = 0.0
        self.gradients: dict[str, torch.Tensor] | None = None
        self.keep_gradients = False
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, arguments: Any, output: Any) -> None:
        self.tokens += arguments[0].numel()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens = 0
        self.started = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.keep_gradients:
            trained = ((name, item) for name, item in model.named_parameters() if item.requires_grad)
            self.gradients = {
                name: torch.zeros(item.shape) if item.grad is None else item.grad.detach().float().cpu().clone()
                for name, item in trained
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self._now() - self.started


class Contender:
    """A trainer whose data are one optimizer step's rankings."""

    def __init__(self, name: str, setup: Setup, case: Case, micro_batch: int) -> None:
        self.model, self.tokenizer = load(setup)
        self.memory = common.PeakMemory(setup.cuda)
        self.memory.start()
        rows = rankings(case, self.model.config.get_text_config().vocab_size, self.tokenizer)
        build = build_trl if name == TRL else build_ours
        self.watch = Watch(self.model, setup.cuda)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = build(name, setup, case, micro_batch, self.model, self.tokenizer, rows, folder)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self.watch)

    def in_float32(self) -> Contender:
        """Itself, with what it trains in float32: both trainers hold the adapters of a 4-bit model in bfloat16."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return self

    def steps(self, count: int) -> float:
        """Take optimizer steps; seconds per step."""
        self.trainer.args.max_steps = count
        self.loss = self.trainer.train().training_loss
        return self.watch.seconds / count

    def gradient(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradient of one optimizer step, which is taken."""
        self.watch.keep_gradients = True
        self.steps(1)
        self.watch.keep_gradients = False
        gradients, self.watch.gradients = self.watch.gradients, None
        return self.loss, gradients or {}


def load(setup: Setup) -> tuple[Any, Any]:
    """The reward model with a fresh head, and its tokenizer."""
    folder = lab.base_model_path() if setup.model == "lab" else Path(setup.model)
    tokenizer = load_tokenizer(folder)
    options = model_options(setup.train, setup.dtype, setup.cuda)
    adapter = LoraConfig(**ADAPTER) if setup.train == "qlora" else None
    torch.manual_seed(0)  # of the adapter
    model = create_reward_model(
        folder, tokenizer, seed=0, peft_config=adapter, attn_implementation=setup.attention, **options
    )
    return model, tokenizer


def rankings(case: Case, vocabulary: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Random tokens; every completion ends with EOS, and the ranks are a random order without ties."""
    draw = torch.Generator().manual_seed(0)
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(min(vocabulary, len(tokenizer))) if token not in special])

    def text(length: int) -> list[int]:
        return words[torch.randint(len(words), (length,), generator=draw)].tolist()

    return [
        {
            "prompt_ids": text(case.prompt),
            "completion_ids": [[*text(case.completion - 1), tokenizer.eos_token_id] for _ in range(case.completions)],
            "ranks": (torch.randperm(case.completions, generator=draw) + 1).tolist(),
        }
        for _ in range(case.prompts)
    ]


def training_settings(setup: Setup, folder: str) -> dict[str, Any]:
    """What both trainers are told. Clipping is off, so that the gradient can be compared as it is."""
    return {
        "output_dir": folder,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": setup.dtype == "bfloat16",
        "use_cpu": not setup.cuda,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def build_ours(
    name: str, setup: Setup, case: Case, micro_batch: int, model: Any, tokenizer: Any, rows: Any, folder: str
) -> Any:
    """This package's trainer, with or without shared prefixes; the step's prompts are one batch, split by tokens."""
    args = RewardConfig(
        **training_settings(setup, folder),
        per_device_train_batch_size=case.prompts,
        gradient_accumulation_steps=1,
        max_tokens_per_forward=case.pass_tokens(micro_batch),
    )
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    if trainer.shared_prefix_refusal is not None:
        raise BenchmarkError(f"no shared prefixes: {trainer.shared_prefix_refusal}")
    if name == PER_COMPLETION:
        trainer.data_collator.hidden_size = None  # the layout of architectures that take no shared rows
    return trainer


def build_trl(
    name: str, setup: Setup, case: Case, micro_batch: int, model: Any, tokenizer: Any, rows: Any, folder: str
) -> Any:
    """TRL's trainer on every pair of the step's prompts, `micro_batch` pairs in one forward pass."""
    args = trl.RewardConfig(
        **training_settings(setup, folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=case.pairs // micro_batch,
        adam_beta2=RewardConfig.adam_beta2,
    )
    return trl.RewardTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(pairs(rows)), processing_class=tokenizer
    )


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of every ranking in TRL's columns, the better completion first."""
    found = []
    for row in rows:
        whole = [row["prompt_ids"] + ids for ids in row["completion_ids"]]
        for better, worse in itertools.permutations(range(len(whole)), 2):
            if row["ranks"][better] < row["ranks"][worse]:
                found.append({"chosen_ids": whole[better], "rejected_ids": whole[worse]})
    return found
