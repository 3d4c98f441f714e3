"""The contenders of benchmarks/reward_model.py: one model, one optimizer step's rankings, three trainers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from common.equality import Gradients
from common.memory import BenchmarkError, PeakMemory, now
from common.models import RandomTokens, model_folder, strict_pairs
from common.training import ADAPTER, model_options, training_settings
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer as TRLRewardTrainer

from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model
from instructgpt_hf.trainers.reward import RewardTrainer

TRL, PER_COMPLETION, SHARED = "trl", "per_completion", "shared_prefix"
Ranking = dict[str, Any]


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
    """Common to all contenders and cases; `train` is full or qlora."""

    model: str
    train: str
    dtype: str
    cuda: bool
    threads: int
    attention: str = "sdpa"


class Contender:
    """A trainer whose data are one optimizer step's rankings.

    Args:
        name: `TRL`, `PER_COMPLETION` or `SHARED`.
        setup: model and training.
        case: shape of the rankings.
        micro_batch: pairs in a forward pass of TRL; this package's passes hold as many tokens.
    """

    def __init__(self, name: str, setup: Setup, case: Case, micro_batch: int) -> None:
        self.model, tokenizer = load(setup)
        self.memory = PeakMemory(setup.cuda)
        self.memory.start()
        rows = rankings(case, RandomTokens(tokenizer, self.model.config.get_text_config().vocab_size), tokenizer)
        self.watch = Watch(self.model, setup.cuda)
        with tempfile.TemporaryDirectory() as folder:
            if name == TRL:
                self.trainer = _trl_trainer(setup, case, micro_batch, self.model, tokenizer, rows, folder)
            else:
                self.trainer = _our_trainer(setup, case, micro_batch, self.model, tokenizer, rows, folder)
        if name == PER_COMPLETION:
            self.trainer.data_collator.hidden_size = None  # the layout of architectures without shared rows
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self.watch)

    def in_float32(self) -> Contender:
        """Itself with float32 trained weights: both trainers hold the adapters of a 4-bit model in bfloat16."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return self

    def steps(self, count: int) -> float:
        """Take optimizer steps; seconds per step."""
        self.trainer.args.max_steps = count
        self.loss = self.trainer.train().training_loss
        return self.watch.seconds / count

    def gradient(self) -> tuple[float, Gradients]:
        """Loss and gradient of one optimizer step, which is taken."""
        self.watch.keep_gradients = True
        self.steps(1)
        self.watch.keep_gradients = False
        gradients, self.watch.gradients = self.watch.gradients, {}
        return self.loss, gradients


class Watch(TrainerCallback):
    """Times a call of `train()`, counts the tokens in the model's passes, and keeps the last step's gradient."""

    def __init__(self, model: PreTrainedModel, cuda: bool) -> None:
        self.cuda = cuda
        self.started = self.seconds = 0.0
        self.gradients: Gradients = {}
        self.keep_gradients = False
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, arguments: Any, output: Any) -> None:
        self.tokens += arguments[0].numel()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens = 0
        self.started = now(self.cuda)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.keep_gradients:
            trained = ((name, item) for name, item in model.named_parameters() if item.requires_grad)
            self.gradients = {
                name: torch.zeros(item.shape) if item.grad is None else item.grad.detach().float().cpu().clone()
                for name, item in trained
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = now(self.cuda) - self.started


def load(setup: Setup) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reward model with a fresh head, and its tokenizer."""
    folder = model_folder(setup.model)
    tokenizer = load_tokenizer(folder)
    options = model_options(setup.train, setup.dtype, setup.cuda)
    adapter = LoraConfig(**ADAPTER) if setup.train == "qlora" else None
    torch.manual_seed(0)  # of the adapter
    model = create_reward_model(
        folder, tokenizer, seed=0, peft_config=adapter, attn_implementation=setup.attention, **options
    )
    return model, tokenizer


def rankings(case: Case, tokens: RandomTokens, tokenizer: PreTrainedTokenizerBase) -> list[Ranking]:
    """Random tokens; every completion ends with EOS, and the ranks are a random order without ties."""
    eos = tokenizer.eos_token_id
    return [
        {
            "prompt_ids": tokens.draw(case.prompt),
            "completion_ids": [[*tokens.draw(case.completion - 1), eos] for _ in range(case.completions)],
            "ranks": [place + 1 for place in tokens.permutation(case.completions)],
        }
        for _ in range(case.prompts)
    ]


def _step_settings(setup: Setup, folder: str) -> dict[str, Any]:
    """Training arguments of both trainers. Clipping is off, so that the gradients can be compared unchanged."""
    return {
        **training_settings(folder, setup.cuda),
        "learning_rate": 1e-5,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": setup.dtype == "bfloat16",
        "logging_strategy": "no",
    }


def _our_trainer(
    setup: Setup, case: Case, micro_batch: int, model: Any, tokenizer: Any, rows: list[Ranking], folder: str
) -> RewardTrainer:
    """This package's trainer; the step's prompts are one batch, split by tokens."""
    args = RewardConfig(
        **_step_settings(setup, folder),
        per_device_train_batch_size=case.prompts,
        gradient_accumulation_steps=1,
        max_tokens_per_forward=case.pass_tokens(micro_batch),
    )
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    if trainer.shared_prefix_refusal is not None:
        raise BenchmarkError(f"no shared prefixes: {trainer.shared_prefix_refusal}")
    return trainer


def _trl_trainer(
    setup: Setup, case: Case, micro_batch: int, model: Any, tokenizer: Any, rows: list[Ranking], folder: str
) -> Trainer:
    """TRL's trainer on every pair of the step's prompts, `micro_batch` pairs in one forward pass."""
    args = TRLRewardConfig(
        **_step_settings(setup, folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=case.pairs // micro_batch,
        adam_beta2=RewardConfig.adam_beta2,
    )
    data = Dataset.from_list(pairs(rows))
    return TRLRewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def pairs(rows: Iterable[Ranking]) -> list[dict[str, Any]]:
    """Every pair of every ranking in TRL's columns."""
    return [
        {"chosen_ids": row["prompt_ids"] + better, "rejected_ids": row["prompt_ids"] + worse}
        for row in rows
        for better, worse in strict_pairs(row)
    ]
