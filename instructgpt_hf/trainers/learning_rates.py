"""Learning rates of the two roles of PPO: a warm-up for the policy, a fixed rate for the value model (C.4)."""

from __future__ import annotations

from typing import Any


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


def apply_rates(args: Any, optimizer: Any, lr_scheduler: Any) -> None:
    """Give a resumed run the rates of its settings, which may be others than those in its checkpoint."""
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    peaks = [peak_rate(args, group["role"]) for group in optimizer.param_groups]
    position = scheduler.last_epoch
    rates = [peak * factor(position) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
    for group, peak, rate in zip(optimizer.param_groups, peaks, rates, strict=True):
        group["initial_lr"], group["lr"] = peak, rate
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": peaks, "_last_lr": rates})
