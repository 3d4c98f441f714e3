"""The only file that touches private names of TRL, transformers, peft and datasets.

`CONTRACTS` lists every name and signature relied on; `tests/test_contracts.py` checks them and says what to do when
one has changed. Subclasses elsewhere override the public names that the classes here give to TRL's private hooks.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import RewardTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.utils import disable_dropout_in_model, pad

from instructgpt_hf._compat.checkpoints import WholeCheckpoints
from instructgpt_hf._compat.contracts import CONTRACTS, RLOO_ATTRIBUTES
from instructgpt_hf._compat.peft import REFERENCE_ADAPTER

__all__ = ["CONTRACTS", "REFERENCE_ADAPTER", "RLOO_ATTRIBUTES", "disable_dropout_in_model", "pad"]


class QuietCard:
    """Keeps TRL from writing its own model card; the card comes from stage.json."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL calls this at every checkpoint."""


class PrivateRepository:
    """A repository that a trainer creates is private unless `hub_private_repo` is False."""

    args: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """What the Trainer calls before it pushes."""
        if private is None:
            private = self.args.hub_private_repo is not False
        super().init_hf_repo(token=token, private=private)  # type: ignore[misc]


class CleanEnd:
    """Ends a run of several processes without a deadlock."""

    model: Any
    model_wrapped: Any

    def end(self) -> None:
        """Let go of the wrapped model, then do what the Trainer does at the end.

        DDP's reducer holds the process group, and where it outlives `destroy_process_group` it destroys the group with
        Python's lock taken: torch then waits for the group's thread, and that thread for the lock to free a tensor.
        """
        self.model_wrapped = self.model
        super().end()  # type: ignore[misc]


class SeveralBackwards:
    """Several backward passes in one step of the training loop."""

    accelerator: Any

    @contextlib.contextmanager
    def without_gradient_sync(self, model: torch.nn.Module) -> Iterator[None]:
        """Backward passes inside only add to this process's gradients, because another one follows in the step.

        Without it, DDP would synchronise twice, and DeepSpeed would take the optimizer step after the first one.
        """
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)


class SupervisedTrainer(QuietCard, PrivateRepository, WholeCheckpoints, CleanEnd, SFTTrainer):
    """TRL's SFTTrainer without its model card."""


class RankingTrainer(QuietCard, PrivateRepository, WholeCheckpoints, CleanEnd, SeveralBackwards, RewardTrainer):
    """TRL's RewardTrainer with the hooks that a dataset of token ids and ranks needs."""

    dataset_columns: tuple[str, ...] = ()
    _signature_columns: list[str] | None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset  # tokenized by instructgpt_hf.data, with every stage's one prompt rendering

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.dataset_columns)

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)


class OnPolicyTrainer(QuietCard, PrivateRepository, WholeCheckpoints, CleanEnd, SeveralBackwards, RLOOTrainer):
    """TRL's RLOOTrainer with public names for the hooks that another on-policy algorithm replaces.

    Subclasses define `render_prompt`, `in_batches`, `continuous_batching`, `episode_sampler`, `rollout`,
    `minibatches`, `minibatch_loss`, `gradient_done`, `save_models`, `load_models`, `set_learning_rates`, and
    `load_state`, which is all that is called where DeepSpeed reads weights and optimizer itself.
    """

    # The loss is normalised over the whole minibatch, so the Trainer must not divide it by the accumulation steps.
    loss_is_scaled_for_ga = True
    _buffered_inputs: list[dict[str, Any]] | None
    _rolled_out: int | None = None
    _current_train_step_time: float
    optimizer: Any
    lr_scheduler: Any
    reward_func_names: list[str]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`; what an earlier one that was interrupted had sampled is not used."""
        self._step, self._buffered_inputs, self._rolled_out = 0, None, None
        return super().train(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.render_prompt(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any) -> Any:
        # TRL's own call rounds the trained weights to half precision in place.
        if self.use_transformers_continuous_batching:
            return self.continuous_batching(prompt_ids)
        generate = functools.partial(super()._generate_single_turn, images=images, multimodal_fields=multimodal_fields)
        return generate(prompt_ids) if self.use_vllm else self.in_batches(generate, prompt_ids)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return self.episode_sampler(self.train_dataset if dataset is None else dataset)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return self.rollout(inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.model.training:
            return self.rollout(generation_batch)
        steps = self.args.steps_per_generation
        due = self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None
        if due and self._rolled_out != self._step:
            self._buffered_inputs = self.minibatches(self.rollout(generation_batch))
            self._rolled_out = self._step
        return self._buffered_inputs[self._step % steps]  # type: ignore[index]

    @contextlib.contextmanager
    def before_training_step(self, generation_batch: Any) -> Iterator[None]:
        """What comes before TRL's `training_step` in a step and is part of its `step_time`; the rollouts, if they are
        due, come first."""
        start = time.perf_counter()
        self._prepare_inputs(generation_batch)
        yield
        self._current_train_step_time += time.perf_counter() - start

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return self.minibatch_loss(model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.save_models(output_dir if output_dir is not None else self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_models(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            self.load_state(checkpoint)
        elif checkpoint is not None:
            self.set_learning_rates()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.gradient_done(norm)
        return norm

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a loss that is divided by the accumulation steps already."""
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)

    def unlogged(self) -> dict[str, Any]:
        """What was measured since the last log, and the sum of the losses, as plain JSON; for `save_models`."""
        loss = {"sum": self._tr_loss.item(), "total": self._total_loss_scalar, "step": self._globalstep_last_logged}
        return {"metrics": dict(self._metrics["train"]), "loss": loss}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the models for use; a checkpoint, which the Trainer writes through here too, is for resuming."""
        if _internal_call and output_dir is not None:  # without a folder it is about to push the models
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.save_pretrained(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint holds no model to push while training goes on; `push_to_hub` writes and pushes it."""

    def restore_unlogged(self, state: dict[str, Any]) -> None:
        """Continue the next log where `unlogged` was taken; once the Trainer has set up its own."""
        for name, values in state["metrics"].items():
            self._metrics["train"][name] = list(values)
        self._tr_loss += state["loss"]["sum"]
        self._total_loss_scalar, self._globalstep_last_logged = state["loss"]["total"], state["loss"]["step"]

    @property
    def mean_loss(self) -> float:
        """Of all steps; the Trainer's own is that of the steps since it was resumed."""
        return float(self._total_loss_scalar / max(self.state.global_step, 1))

    def generate(self, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]], list[Any]]:
        """Sample one completion for each prompt.

        Returns:
            Prompt ids, completion ids (up to and with EOS), and completions as text or messages.
        """
        # The wrapper that applies autocast is around the whole module, which generation unwraps; without it here,
        # tokens would be drawn in another precision than the one their log-probabilities are taken in.
        with self.accelerator.autocast():
            return self._generate(prompts)

    def rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Rewards [episodes of all processes, reward functions]; NaN where a function does not apply.

        What a function passed to `log_metric` is logged, what it passed to `log_extra` joins TRL's table.
        """
        found = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        for column, values in self._pending_extra_logs.items():
            self._logs["extra"][column].extend(values)
        self._pending_extra_logs.clear()
        # In one order on all processes, which take part in every gathering.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            sums = torch.tensor([float(sum(values)), float(len(values))], device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            # Not through a subclass's `record`: such a value need not be finite.
            OnPolicyTrainer.record(self, name, total / count)
        self._pending_metrics.clear()
        return found

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def record_samples(
        self, prompts: list[Any], completions: list[Any], rewards: torch.Tensor, advantages: Any
    ) -> None:
        """Keep rollouts for TRL's table of completions."""
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(rewards[:, index].tolist())
        self._logs["advantages"].extend(advantages)

    @property
    def micro_step(self) -> int:
        """Forward and backward passes taken so far."""
        return int(self._step)

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self._tokenizer
