"""Learning rates of the two roles of PPO: a warm-up for the policy, a fixed rate for the value model (C.4)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def peak_rate(args: Any, role: str) -> float:
    """The learning rate of `"policy"` or `"value_model"` without its warm-up."""
    return float(args.value_learning_rate if role == "value_model" else args.learning_rate)


def policy_factor(args: Any, step: int) -> float:
    """Share of the peak that the policy's learning rate has at an optimizer step.

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


def parameter_groups(args: Any, actor_critic: Any, decayed: set[str]) -> list[dict[str, Any]]:
    """What an optimizer is given: the weights by role, and by whether they decay.

    Args:
        args: `PPOConfig`.
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


def make_scheduler(args: Any, optimizer: Any) -> LambdaLR:
    """The policy's groups follow `policy_factor`, the value model's keep their rate."""
    warmup = partial(policy_factor, args)
    policy = [group["role"] == "policy" for group in optimizer.param_groups]
    return LambdaLR(optimizer, [warmup if item else (lambda _step: 1.0) for item in policy])


def apply_rates(args: Any, optimizer: Any, lr_scheduler: Any) -> None:
    """Give a resumed run the rates of its settings, which may be others than those in its checkpoint."""
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    peaks = [peak_rate(args, group["role"]) for group in optimizer.param_groups]
    position = scheduler.last_epoch
    rates = [peak * factor(position) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
    for group, peak, rate in zip(optimizer.param_groups, peaks, rates, strict=True):
        group["initial_lr"], group["lr"] = peak, rate
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": peaks, "_last_lr": rates})


class GradientComparison:
    """Length ratio and angle of the gradient already in the buffers and the one that the block adds.

    The block runs one backward pass that reaches the parameters. Each one's new gradient is seen on its way into the
    buffer, so no second copy of the gradients exists, and under DistributedDataParallel both are this process's own.

    Args:
        parameters: those to compare over; frozen ones are left out.
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
        def see(gradient: Tensor) -> None:
            wide = gradient.detach().float()
            self._added = self._added + wide.square().sum()
            if parameter.grad is not None:
                self._product = self._product + (parameter.grad.float() * wide).sum()

        return see

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def ratio(self) -> Tensor:
        """Length of the gradient before over that of the one added."""
        return (self._before / self._added.clamp(min=1e-24)).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of the angle between them; 0 if one of them is 0."""
        lengths = self._before.sqrt() * self._added.sqrt()
        return torch.where(lengths > 0, self._product / lengths.clamp(min=1e-24), 0.0)
