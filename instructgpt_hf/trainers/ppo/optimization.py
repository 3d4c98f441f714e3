"""Optimizer steps of PPO and PPO-ptx: losses, pretraining gradient, and the learning rates of C.4."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from instructgpt_hf._compat.trainers import OnPolicyTrainer
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.data.pretraining import PretrainingStream
from instructgpt_hf.functional import (
    loss_denominator,
    masked_mean,
    policy_loss,
    ppo_ptx_loss,
    predicted_mask,
    value_loss,
)
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.trainers.ppo.rollouts import MicroBatch, Rollouts, draw_minibatches, split_minibatches
from instructgpt_hf.trainers.ppo.watchdog import Guard


def peak_rate(args: PPOConfig, role: str) -> float:
    """Learning rate of `"policy"` or `"value_model"` after the warm-up."""
    return float(args.value_learning_rate if role == "value_model" else args.learning_rate)


def policy_factor(args: PPOConfig, step: int) -> float:
    """Learning-rate multiplier of the policy at optimizer step `step`: the warm-up of C.4.

    It is 0 in the `value_warmup_iterations`, rises linearly over the next `warmup_iterations` from
    `warmup_start_factor`, and is 1 from there.
    """
    iteration = step // args.optimizer_steps_per_iteration - args.value_warmup_iterations
    if iteration < 0:
        return 0.0
    start, length = args.warmup_start_factor, args.warmup_iterations
    if iteration >= length - 1:
        return 1.0
    return float(start + (1.0 - start) * iteration / (length - 1))


@contextlib.contextmanager
def gradient_comparison(parameters: Iterable[nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Compare the accumulated gradient with the one added inside the block: length ratio and cosine, after the block.

    The block runs one backward pass that reaches the parameters, all of them trained. A hook reads each new gradient
    before it is added to the buffer, so no second copy of the gradients exists, and under DistributedDataParallel both
    are this process's own. The cosine is 0 if one of the gradients is 0.
    """
    trained, metrics = list(parameters), dict[str, Tensor]()
    before = added = product = torch.zeros(())

    def add(parameter: nn.Parameter, gradient: Tensor) -> None:
        nonlocal added, product
        wide = gradient.detach().float()
        added = added + wide.square().sum()
        if parameter.grad is not None:
            product = product + (parameter.grad.float() * wide).sum()

    handles = [item.register_hook(partial(add, item)) for item in trained]
    squares = [item.grad.float().square().sum() for item in trained if item.grad is not None]
    before = torch.stack(squares).sum() if squares else before
    try:
        yield metrics
    finally:
        for handle in handles:
            handle.remove()
    lengths = before.sqrt() * added.sqrt()
    metrics["grad_norm_ratio_ptx"] = (before / added.clamp(min=1e-24)).sqrt()
    metrics["grad_cosine_ptx"] = torch.where(lengths > 0, product / lengths.clamp(min=1e-24), 0.0)


class PPOOptimization(OnPolicyTrainer[Rollouts, MicroBatch]):
    """Optimizer steps of `PPOTrainer`: minibatches, losses, the pretraining gradient, learning rates."""

    args: PPOConfig
    actor_critic: ActorCritic
    pretraining: PretrainingStream | None  # None for plain PPO
    guard: Guard

    @property
    def iteration(self) -> int:
        """Iterations completed so far."""
        return int(self.state.global_step) // self.args.optimizer_steps_per_iteration

    @property
    def value_only(self) -> bool:
        """Whether this iteration trains the value model alone."""
        return self.iteration < int(self.args.value_warmup_iterations)

    def minibatches(self, rollouts: Rollouts) -> list[MicroBatch]:
        """Shuffle rollouts into minibatches, each split into micro-batches with the minibatch's loss denominators."""
        args = self.args
        rows = draw_minibatches(
            args.generation_batch_size,
            args.generation_batch_size // args.minibatch_size,
            seed=args.seed * 1_000_003 + self.iteration,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        size, reduction = args.per_device_train_batch_size, args.policy_loss_reduction
        return split_minibatches(rollouts, rows, size, reduction, self.accelerator)

    def one_minibatch(self, rollouts: Rollouts) -> MicroBatch:
        """Rollouts of an evaluation; their losses are means over tokens."""
        return MicroBatch(rollouts)

    def minibatch_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Policy loss + vf_coef * value loss of one micro-batch.

        The value model's gradient is accumulated here, before the policy runs, so that the activations of one of
        them are held at a time; the loss that is returned has the policy's gradient only. In an iteration that trains
        the value model alone, the loss that is returned is the value model's, with its gradient.
        """
        vf_coef = self.args.vf_coef
        if self.value_only:
            with torch.no_grad():
                self._policy_loss(model, inputs)
            return vf_coef * self._value_loss(model, inputs)
        with self.without_gradient_sync(model):
            value = self._value_loss(model, inputs)
            if torch.is_grad_enabled():  # not in an evaluation
                self.backward(vf_coef * value)
        return ppo_ptx_loss(self._policy_loss(model, inputs), value.detach(), vf_coef)

    @property
    def _complete(self) -> bool:
        """Whether a pass of one role has to give the other one a gradient of 0.

        DDP synchronises once every parameter has a gradient. DeepSpeed empties the buffers of gradients that it keeps
        in the CPU's memory by writing those of a step's first pass over them.
        """
        synchronises = self.accelerator.num_processes > 1 and self.accelerator.sync_gradients
        return bool(self.is_deepspeed_enabled or synchronises)

    def _policy_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Clipped policy loss; records metrics, weighted so that means over micro-batches are the minibatch's."""
        rollouts, weight = inputs.rollouts, self._weight(inputs)
        mask = rollouts.tokens.completion_mask
        output = model(*rollouts.tokens.joined(), with_entropy=True, role="policy", complete=self._complete)
        result = policy_loss(
            output.logps,
            rollouts.logps,
            rollouts.advantages,
            mask,
            self.epsilon_low,
            self.epsilon_high,
            inputs.policy_denominator,
        )
        self._record_means(
            {
                "loss/policy": result.loss * self.args.gradient_accumulation_steps,
                "policy/clip_fraction": result.clip_fraction * weight,
                "policy/approx_kl": result.approx_kl * weight,
                "policy/ratio": result.ratio_mean * weight,
                "objective/entropy": masked_mean(output.entropy, mask) * weight,
            }
        )
        return result.loss

    def _value_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Clipped value loss; records metrics like `_policy_loss`."""
        rollouts, mask, clip = inputs.rollouts, inputs.rollouts.tokens.completion_mask, self.args.cliprange_value
        output = model(*rollouts.tokens.joined(), role="value_model", complete=self._complete)
        result = value_loss(output.values, rollouts.values, rollouts.returns, mask, clip, inputs.value_denominator)
        loss = result.loss * self.args.gradient_accumulation_steps
        self._record_means({"loss/value": loss, "val/clip_fraction": result.clip_fraction * self._weight(inputs)})
        return result.loss

    def _weight(self, inputs: MicroBatch) -> Tensor | float:
        """Weight of this micro-batch's token means within its minibatch, times the number of micro-batches."""
        if inputs.value_denominator is None:
            return 1.0
        tokens = inputs.rollouts.tokens.completion_mask.sum()
        return tokens / inputs.value_denominator * self.args.gradient_accumulation_steps

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The PPO gradient and, for PPO-ptx, the pretraining gradient of one micro-batch (C.4).

        The paper accumulates the two in consecutive steps; here the pretraining pass comes first, without gradient
        synchronisation, so that distributed wrappers synchronise the sum once. The sum is the gradient of
        `functional.ppo_ptx_loss`.
        """
        if self.pretraining is None or self.value_only:
            return super().training_step(model, inputs, num_items_in_batch)
        first = self.micro_step % (self.args.steps_per_generation * self.num_iterations) == 0
        model.train()
        with self.before_training_step(inputs):
            self._pretraining_backward(model, self.pretraining)
        if not first or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        with gradient_comparison(self.actor_critic.role_parameters("policy").values()) as metrics:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._record_means(metrics)
        return loss

    def pretraining_stream(self, dataset: Dataset | IterableDataset) -> PretrainingStream:
        """This process's blocks of the pretraining text."""
        return PretrainingStream(
            dataset,
            self.tokenizer,
            self.args.ptx_max_length,
            self.args.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def _pretraining_backward(self, model: nn.Module, stream: PretrainingStream) -> None:
        """Accumulate the gradient of ptx_coef times the next-token loss on pretraining text."""
        args, device = self.args, self.accelerator.device
        rows = args.ptx_episodes_ratio * args.per_device_train_batch_size
        blocks = torch.tensor([next(stream) for _ in range(rows)], device=device)
        counted = predicted_mask(torch.ones_like(blocks))
        denominator = loss_denominator(counted, args.ptx_loss_reduction) * args.gradient_accumulation_steps
        total = torch.zeros((), device=device)
        with self.without_gradient_sync(model):
            for piece in blocks.split(args.per_device_train_batch_size):
                with self.compute_loss_context_manager():
                    loss = model(piece, torch.ones_like(piece), complete=self._complete).lm_loss
                self.backward(args.ptx_coef * loss / denominator)
                total += loss.detach()
        self._record_means({"loss/ptx": total / counted.sum()})

    def gradient_done(self, norm: Tensor | float | None) -> None:
        """Check the gradient; drop the policy's while the value model is trained alone."""
        self.guard.gradient_done(self.state.global_step, norm)
        if self.value_only:
            # Without gradients the optimizer leaves weights and their state alone.
            for parameter in self.actor_critic.role_parameters("policy").values():
                parameter.grad = None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """One optimizer; the value model's parameters have their own learning rate (C.4).

        Its parameter groups are by role and by whether weights decay.
        """
        if self.optimizer is not None:
            return self.optimizer
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.actor_critic)
        decayed = set(self.get_decay_parameter_names(self.actor_critic))
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for role in ("policy", "value_model"):
            rate = peak_rate(self.args, role)
            for name, parameter in self.actor_critic.role_parameters(role).items():
                decay = self.args.weight_decay if name in decayed else 0.0
                group: dict[str, Any] = {"params": [], "role": role, "lr": rate, "weight_decay": decay}
                groups.setdefault((role, name in decayed), group)["params"].append(parameter)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """The policy's learning rate follows `policy_factor`; the value model's is fixed (C.4)."""
        if self.lr_scheduler is None:
            optimizer, warmup = optimizer or self.optimizer, partial(policy_factor, self.args)
            policy = [group["role"] == "policy" for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [warmup if item else (lambda _step: 1.0) for item in policy])
        return self.lr_scheduler

    def set_learning_rates(self) -> None:
        """Give a resumed run the learning rates of its settings, which may differ from its checkpoint's."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        peaks = [peak_rate(self.args, group["role"]) for group in self.optimizer.param_groups]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [peak * factor for peak, factor in zip(peaks, factors, strict=True)]
        for group, peak, rate in zip(self.optimizer.param_groups, peaks, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": peaks, "_last_lr": rates})

    def _record_means(self, values: dict[str, Tensor]) -> None:
        """Record the means over processes of several scalars."""
        means = self.accelerator.reduce(torch.stack([item.detach().float() for item in values.values()]), "mean")
        for name, value in zip(values, means.tolist(), strict=True):
            self.record(name, value)
