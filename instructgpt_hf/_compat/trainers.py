"""Bases of the three trainers: TRL's trainers with public names for the private hooks that this package replaces.

`contracts.py` lists every private name and signature relied on; `tests/test_contracts.py` checks them and says what to
do when one has changed.
"""

from __future__ import annotations

import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import RewardTrainer, RLOOTrainer, SFTTrainer

from instructgpt_hf._compat.mixins import CommonChanges, SeveralBackwards
from instructgpt_hf._compat.quirks import pass_completion_column

__all__ = ["OnPolicyTrainer", "RankingTrainer", "SupervisedTrainer"]

TokenLists = list[list[int]]
RolloutsT = TypeVar("RolloutsT")
MicroBatchT = TypeVar("MicroBatchT")


class SupervisedTrainer(CommonChanges, SFTTrainer):
    """TRL's SFTTrainer with whole checkpoints, private repositories and no model card of its own."""


class RankingTrainer(CommonChanges, SeveralBackwards, RewardTrainer):
    """TRL's RewardTrainer for a dataset of token ids and ranks, named by `dataset_columns`.

    Cause: `RewardTrainer` tokenizes `chosen` and `rejected` itself and keeps only the columns of pairs.
    Goes when: TRL's reward trainer takes a tokenized dataset of K completions.
    Relies on: the constructor calling `_prepare_dataset`, the dataloader `_set_signature_columns_if_needed`.
    """

    dataset_columns: tuple[str, ...] = ()
    _signature_columns: list[str] | None

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        return dataset  # tokenized by instructgpt_hf.data, with every stage's one prompt rendering

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.dataset_columns)


class OnPolicyTrainer(CommonChanges, SeveralBackwards, RLOOTrainer, ABC, Generic[RolloutsT, MicroBatchT]):
    """TRL's RLOOTrainer with abstract public hooks for the parts that another on-policy algorithm replaces.

    Rollouts and micro-batches need not be dicts: between `_prepare_inputs` and `compute_loss`, Trainer and TRL only
    pass them on.

    Cause: TRL has no PPO since 1.13; RLOOTrainer samples completions and calls reward functions as PPO needs it, and
        has private names for the parts in which the algorithms differ.
    Goes when: TRL has an on-policy base class with public hooks.
    Relies on: the names, signatures and attributes of `contracts.py`, and who calls them (`tests/test_contracts.py`).
    """

    # The loss is normalised over the whole minibatch, so the Trainer must not divide it by the accumulation steps.
    loss_is_scaled_for_ga = True
    _buffered_inputs: list[MicroBatchT] | None
    _rolled_out: int | None = None
    _current_train_step_time: float
    optimizer: Any  # None until `create_optimizer`
    lr_scheduler: Any
    reward_func_names: list[str]

    # Hooks

    @abstractmethod
    def render_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt of the dataset."""

    @abstractmethod
    def in_batches(self, generate: Callable[[TokenLists], TokenLists], prompt_ids: TokenLists) -> TokenLists:
        """Completions by `generate`, called for one or more batches of the prompts."""

    @abstractmethod
    def continuous_batching(self, prompt_ids: TokenLists) -> TokenLists:
        """Completions by transformers' continuous batching."""

    @abstractmethod
    def episode_sampler(self, dataset: Dataset) -> Sampler[int]:
        """Sampler of the prompts, each iteration's repeated for every micro-batch."""

    @abstractmethod
    def rollout(self, inputs: list[dict[str, Any]]) -> RolloutsT:
        """Sample and score completions for this process's rows of the dataset."""

    @abstractmethod
    def minibatches(self, rollouts: RolloutsT) -> list[MicroBatchT]:
        """Split rollouts into the micro-batches of one inner epoch, in order."""

    @abstractmethod
    def one_minibatch(self, rollouts: RolloutsT) -> MicroBatchT:
        """Rollouts of an evaluation as a minibatch of their own."""

    @abstractmethod
    def minibatch_loss(self, model: nn.Module, inputs: MicroBatchT) -> torch.Tensor:
        """Loss of one micro-batch, divided by the accumulation steps already."""

    @abstractmethod
    def gradient_done(self, norm: torch.Tensor | float | None) -> None:
        """Check or change the gradient before an optimizer step; `norm` is None where it is not known."""

    @abstractmethod
    def set_learning_rates(self) -> None:
        """Set the learning rates of a resumed run that has read its optimizer and scheduler."""

    @abstractmethod
    def save_models(self, output_dir: str) -> None:
        """Write the files of a checkpoint that the Trainer does not write itself."""

    @abstractmethod
    def load_models(self, checkpoint: str) -> None:
        """Read the files of `save_models`."""

    @abstractmethod
    def load_state(self, checkpoint: str) -> None:
        """Read the files of `save_models` apart from weights, which DeepSpeed reads itself."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the models for use."""

    # TRL's private hooks

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does. Discards rollouts buffered by an interrupted run."""
        self._step, self._buffered_inputs, self._rolled_out = 0, None, None
        return super().train(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[TokenLists, None, dict[str, Any]]:
        return [self.render_prompt(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: TokenLists, images: Any, multimodal_fields: Any) -> TokenLists:
        # TRL's own call rounds the trained weights to half precision in place.
        if self.use_transformers_continuous_batching:
            return self.continuous_batching(prompt_ids)
        generate = functools.partial(super()._generate_single_turn, images=images, multimodal_fields=multimodal_fields)
        return generate(prompt_ids) if self.use_vllm else self.in_batches(generate, prompt_ids)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return self.episode_sampler(self.train_dataset if dataset is None else dataset)

    def _prepare_inputs(self, generation_batch: Any) -> MicroBatchT:
        if not self.model.training:
            return self.one_minibatch(self.rollout(generation_batch))
        steps = self.args.steps_per_generation
        due = self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None
        if due and self._rolled_out != self._step:
            self._buffered_inputs = self.minibatches(self.rollout(generation_batch))
            self._rolled_out = self._step
        return self._buffered_inputs[self._step % steps]  # type: ignore[index]

    @contextlib.contextmanager
    def before_training_step(self, generation_batch: Any) -> Iterator[None]:
        """Context for work before TRL's `training_step`, part of `step_time`; samples rollouts if they are due."""
        start = time.perf_counter()
        self._prepare_inputs(generation_batch)
        yield
        self._current_train_step_time += time.perf_counter() - start

    def _compute_loss(self, model: nn.Module, inputs: MicroBatchT) -> torch.Tensor:
        return self.minibatch_loss(model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.save_models(output_dir if output_dir is not None else self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_models(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            self.load_state(checkpoint)
        elif checkpoint is not None:
            self.set_learning_rates()

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> torch.Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        self.gradient_done(norm)
        return norm

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a loss that is divided by the accumulation steps already."""
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the models for use, or where the Trainer calls it for a checkpoint, the files for resuming."""
        if _internal_call and output_dir is not None:  # without a folder it is about to push the models
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.save_pretrained(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: a checkpoint holds no model for use; `push_to_hub` writes and pushes one."""

    def generate(self, prompts: list[Any]) -> tuple[TokenLists, TokenLists, list[Any]]:
        """Sample one completion for each prompt.

        Returns:
            Prompt ids, completion ids (up to and with EOS), and completions as text or messages.
        """
        # The wrapper that applies autocast is around the whole module, which generation unwraps; without it here,
        # tokens would be drawn in another precision than the one their log-probabilities are taken in.
        with self.accelerator.autocast():
            return self._generate(prompts)

    def rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: TokenLists
    ) -> torch.Tensor:
        """Rewards [episodes of all processes, reward functions]; NaN where a function does not apply.

        Values that a function passed to `log_metric` are logged; those passed to `log_extra` are added to TRL's table.
        """
        rewards = self._calculate_rewards(pass_completion_column(inputs), prompts, completions, completion_ids)
        for column, values in self._pending_extra_logs.items():
            self._logs["extra"][column].extend(values)
        self._pending_extra_logs.clear()
        # In the same order on all processes, because each takes part in every gathering.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            sums = torch.tensor([float(sum(values)), float(len(values))], device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            # Not through a subclass's `record`: such a value need not be finite.
            CommonChanges.record(self, name, total / count)
        self._pending_metrics.clear()
        return rewards

    def record_samples(
        self, prompts: list[Any], completions: list[Any], rewards: torch.Tensor, advantages: list[float]
    ) -> None:
        """Add rollouts to TRL's table of completions."""
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(rewards[:, index].tolist())
        self._logs["advantages"].extend(advantages)

    @property
    def micro_step(self) -> int:
        """Micro-batches of training so far."""
        return int(self._step)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self._tokenizer
