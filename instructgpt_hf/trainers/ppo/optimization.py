"""Optimizer steps of PPO and PPO-ptx: losses, pretraining gradient, and the learning rates of C.4."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from instructgpt_hf._compat.trainers import OnPolicyTrainer
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.data.pretraining import PretrainingStream
from instructgpt_hf.functional import loss_denominator, ppo_ptx_loss, predicted_mask
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.trainers.ppo.losses import policy_term, value_term
from instructgpt_hf.trainers.ppo.rollouts import MicroBatch, Rollouts, deal, split_minibatches
from instructgpt_hf.trainers.ppo.watchdog import Guard


def peak_rate(args: PPOConfig, role: str) -> float:
    """Learning rate of `"policy"` or `"value_model"` after the warm-up."""
    return float(args.value_learning_rate if role == "value_model" else args.learning_rate)


def policy_factor(args: PPOConfig, step: int) -> float:
    """Learning-rate multiplier of the policy at optimizer step `step`: the warm-up of C.4.

    It rises linearly over the policy's first `warmup_iterations` iterations from `warmup_start_factor` and is 1 from
    there (C.4). The policy's first iteration is the one after the `value_warmup_iterations`, in which it is 0.
    """
    iteration = step // args.optimizer_steps_per_iteration - args.value_warmup_iterations
    if iteration < 0:
        return 0.0
    start, length = args.warmup_start_factor, args.warmup_iterations
    if iteration >= length - 1:
        return 1.0
    return float(start + (1.0 - start) * iteration / (length - 1))


def parameter_groups(args: PPOConfig, actor_critic: ActorCritic, decayed: set[str]) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer, by role and by whether weights decay.

    Args:
        args: learning rates and weight decay.
        actor_critic: both models.
        decayed: names of the parameters that decay.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for role in ("policy", "value_model"):
        rate = peak_rate(args, role)
        for name, parameter in actor_critic.role_parameters(role).items():
            decay = args.weight_decay if name in decayed else 0.0
            group: dict[str, Any] = {"params": [], "role": role, "lr": rate, "weight_decay": decay}
            groups.setdefault((role, name in decayed), group)["params"].append(parameter)
    return list(groups.values())


def make_scheduler(args: PPOConfig, optimizer: Optimizer) -> LambdaLR:
    """Scheduler in which the policy's groups follow `policy_factor` and the value model's rate is constant."""
    warmup = partial(policy_factor, args)
    policy = [group["role"] == "policy" for group in optimizer.param_groups]
    return LambdaLR(optimizer, [warmup if item else (lambda _step: 1.0) for item in policy])


def apply_rates(args: PPOConfig, optimizer: Optimizer, lr_scheduler: LambdaLR | AcceleratedScheduler) -> None:
    """Set a resumed run's learning rates to those of its settings, which may differ from its checkpoint's."""
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    peaks = [peak_rate(args, group["role"]) for group in optimizer.param_groups]
    position = scheduler.last_epoch
    rates = [peak * factor(position) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
    for group, peak, rate in zip(optimizer.param_groups, peaks, rates, strict=True):
        group["initial_lr"], group["lr"] = peak, rate
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": peaks, "_last_lr": rates})


class GradientComparison:
    """Length ratio and cosine of two gradients: the accumulated one, and the one added inside the `with` block.

    The block runs one backward pass that reaches the parameters. A hook reads each new gradient before it is added to
    the buffer, so no second copy of the gradients exists, and under DistributedDataParallel both are this process's
    own.

    Args:
        parameters: the gradients' parameters; frozen ones are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [item for item in parameters if item.requires_grad]
        self._before = self._added = self._product = torch.zeros(())

    def __enter__(self) -> GradientComparison:
        self._handles = [item.register_hook(self._hook(item)) for item in self.parameters]
        squares = [item.grad.float().square().sum() for item in self.parameters if item.grad is not None]
        self._before = torch.stack(squares).sum() if squares else self._before
        return self

    def _hook(self, parameter: nn.Parameter) -> object:
        def accumulate(gradient: Tensor) -> None:
            wide = gradient.detach().float()
            self._added = self._added + wide.square().sum()
            if parameter.grad is not None:
                self._product = self._product + (parameter.grad.float() * wide).sum()

        return accumulate

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def ratio(self) -> Tensor:
        """Length of the accumulated gradient over that of the added one."""
        return (self._before / self._added.clamp(min=1e-24)).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of the angle between the two gradients; 0 if one of them is 0."""
        lengths = self._before.sqrt() * self._added.sqrt()
        return torch.where(lengths > 0, self._product / lengths.clamp(min=1e-24), 0.0)


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
        rows = deal(
            args.generation_batch_size,
            args.generation_batch_size // args.minibatch_size,
            args.seed * 1_000_003 + self.iteration,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        size, reduction = args.per_device_train_batch_size, args.policy_loss_reduction
        return split_minibatches(rollouts, rows, size, reduction, self.accelerator)

    def one_minibatch(self, rollouts: Rollouts) -> MicroBatch:
        """Rollouts of an evaluation; their losses are means over tokens."""
        return MicroBatch(rollouts)

    def minibatch_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Policy loss + vf_coef * value loss of one micro-batch.

        The value model's gradient is accumulated here, before the policy runs, so that the activations of one of
        them are held at a time; the loss that is returned has the policy's gradient only. While the value model is
        trained alone, it has the value model's.
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
        tokens, steps = inputs.rollouts.tokens, self.args.gradient_accumulation_steps
        output = model(*tokens.joined(), with_entropy=True, role="policy", complete=self._complete)
        loss, metrics = policy_term(output, inputs, self.epsilon_low, self.epsilon_high, steps)
        self._record_means(metrics)
        return loss

    def _value_loss(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        output = model(*inputs.rollouts.tokens.joined(), role="value_model", complete=self._complete)
        loss, metrics = value_term(output, inputs, self.args.cliprange_value, self.args.gradient_accumulation_steps)
        self._record_means(metrics)
        return loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
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
        with GradientComparison(self.actor_critic.role_parameters("policy").values()) as comparison:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._record_means({"grad_norm_ratio_ptx": comparison.ratio, "grad_cosine_ptx": comparison.cosine})
        return loss

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
        """One optimizer; the value model's parameters have their own learning rate (C.4)."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.actor_critic)
            decayed = set(self.get_decay_parameter_names(self.actor_critic))
            self.optimizer = optimizer_class(parameter_groups(self.args, self.actor_critic, decayed), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """The policy's learning rate follows `policy_factor`; the value model's is fixed (C.4)."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_scheduler(self.args, optimizer or self.optimizer)
        return self.lr_scheduler

    def set_learning_rates(self) -> None:
        """Give a resumed run the learning rates of its settings."""
        apply_rates(self.args, self.optimizer, self.lr_scheduler)

    def _record_means(self, values: dict[str, Tensor]) -> None:
        """Record the means over processes of several scalars."""
        means = self.accelerator.reduce(torch.stack([item.detach().float() for item in values.values()]), "mean")
        for name, value in zip(values, means.tolist(), strict=True):
            self.record(name, value)
