"""Guard of a PPO run: warnings with advice, and a clean stop where further training cannot help.

The thresholds are ours: the paper states none.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from instructgpt_hf._compat.checkpoints import last_checkpoint, set_aside
from instructgpt_hf.errors import InstructGPTError

if TYPE_CHECKING:
    from instructgpt_hf.config.ppo import PPOConfig

# Best-of-n sampling is log(n) - (n-1)/n nats from its policy: 50 nats are a stronger selection than the best of 10^21
# completions, and eight times the target of Ziegler et al. (2019). A reward model says little about such completions.
KL_WARNING = 50.0
# Shares of the first iteration's entropy and of an iteration's completions; completions of one word are not a collapse
# if the policy started with them.
ENTROPY_SHARE = 0.1
MOST_FREQUENT = 0.5
# A value model that gives every token the same value explains nothing, give or take rounding.
EXPLAINED = 0.01
# Float16's loss scale starts at 2^16 and is halved by every step with a gradient that is not finite.
SCALER_PATIENCE = 20

TRY_SMALLER_STEPS = (
    "a smaller learning_rate, a larger beta or a kl_target, or, from the start, fewer inner epochs (num_iterations)"
)
TRY_FINITE = (
    "a smaller learning_rate and value_learning_rate, a smaller max_grad_norm; with float16 (fp16) bfloat16 or float32"
)
# Prefixes of metrics that depend on the rewards alone, not on the trained models.
FROM_REWARDS = ("rewards/", "objective/scores", "a reward")
TRY_REWARDS = "the reward function or model by itself on such completions; a reward model may overflow in float16"


class TrainingStopped(InstructGPTError):
    """Training ended because going on cannot help; the last good checkpoint is on disk."""


class Sign(NamedTuple):
    """Sign of trouble in the mean of one metric over an iteration.

    Attributes:
        metric: name.
        shows: whether a value shows trouble, given the first iteration's value.
        text: the warning; `{value}` and `{first}` are filled in.
        iterations: how many in a row must show it.
        grace: iterations at the start that do not count.
    """

    metric: str
    shows: Callable[[float, float], bool]
    text: str
    iterations: int = 1
    grace: int = 0


SIGNS = (
    Sign(
        "objective/kl",
        lambda value, _: value > KL_WARNING,
        f"the KL to the starting policy is {{value:.0f}} nats per completion, above {KL_WARNING:.0f}: the policy may "
        f"exploit the reward model. Try {TRY_SMALLER_STEPS}; stop_kl stops a run at a KL of your choice.",
    ),
    Sign(
        "objective/entropy",
        lambda value, first: value < ENTROPY_SHARE * first,
        "the entropy has fallen to {value:.3g} nats per token from {first:.3g}: the policy settles on one completion. "
        f"Try {TRY_SMALLER_STEPS}.",
        iterations=3,
    ),
    Sign(
        "completions/most_frequent",
        lambda value, first: value > MOST_FREQUENT and value > 2 * first,
        "{value:.0%} of the completions are the same one, {first:.0%} were at the start: the policy settles on one. "
        f"Try {TRY_SMALLER_STEPS}, and look at what that completion scores.",
        iterations=3,
    ),
    Sign(
        "val/explained_variance",
        lambda value, _: value < EXPLAINED,
        "the value model has explained no more than a constant would for 10 iterations (val/explained_variance "
        "{value:.2f}). Try a larger value_learning_rate or vf_coef, or, from the start, value_warmup_iterations.",
        iterations=10,
        grace=10,
    ),
)


@dataclass
class EarlyWarnings:
    """Detector of signs of trouble in the metrics of successive iterations; warns of each sign once.

    Its fields are plain JSON for a checkpoint, by metric: the first value, and how many iterations in a row showed a
    sign; and the metrics that were warned about.
    """

    iterations: int = 0
    first: dict[str, float] = field(default_factory=dict)
    row: dict[str, int] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)

    def iteration(self, metrics: Mapping[str, float]) -> list[str]:
        """Add one iteration's means; returns the warnings that are due."""
        self.iterations += 1
        texts = []
        for sign in SIGNS:
            value = metrics.get(sign.metric, math.nan)
            if not math.isfinite(value):  # float16's scaler leaves such a step out
                continue
            first = self.first.setdefault(sign.metric, value)
            counts = self.iterations > sign.grace and sign.shows(value, first)
            self.row[sign.metric] = self.row.get(sign.metric, 0) + 1 if counts else 0
            if self.row[sign.metric] >= sign.iterations and sign.metric not in self.given:
                self.given.append(sign.metric)
                texts.append(sign.text.format(value=value, first=first))
        return texts


class Guard(TrainerCallback):
    """Callback that reads the metrics of a PPO trainer; it warns, or stops before weights or checkpoints are spoilt.

    The values are the same in all processes, so that all of them stop. The guard copies nothing from the device but
    the gradient's norm at an optimizer step and one flag for the weights at the end of an iteration.

    Args:
        args: settings of the run.
        all_finite: returns whether every trained weight is finite, in all processes.
        gradients_are_scaled: whether float16's gradient scaler skips steps with a gradient that is not finite.

    Attributes:
        warn: called with the text of a warning.
        values: values of this iteration by metric.
        broken: the first value of this optimizer step that is not finite, as "metric is value".
    """

    def __init__(self, args: PPOConfig, all_finite: Callable[[], bool], gradients_are_scaled: bool = False) -> None:
        self.args = args
        self.steps = args.optimizer_steps_per_iteration
        self.all_finite = all_finite
        self.patience = SCALER_PATIENCE if gradients_are_scaled else 1
        self.warnings = EarlyWarnings()
        self.warn: Callable[[str], None] = logging.getLogger(__name__).warning
        self.values: dict[str, list[float]] = {}
        self.broken: str | None = None
        self.bad_steps = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Discard the values of an earlier training that was stopped or interrupted."""
        self.values.clear()
        self.broken, self.bad_steps = None, 0

    def add(self, name: str, value: float) -> None:
        """Add a value of one of this iteration's metrics."""
        self.values.setdefault(name, []).append(value)
        self._check(name, value)

    def _check(self, name: str, value: float) -> None:
        if self.broken is None and not math.isfinite(value):
            self.broken = f"{name} is {value}"

    def rollouts_done(self, step: int) -> None:
        """Check the rollouts before an optimizer step uses them; `step` of these have been taken.

        Raises:
            TrainingStopped: if a score, value or log-probability is not finite or the KL is above `stop_kl`.
        """
        if self.broken is not None and self.broken.startswith(FROM_REWARDS):
            raise self._stopped(step, self.broken, TRY_REWARDS)
        if self.broken is not None:
            raise self.unusable_rollouts(step, self.broken)
        limit, kl = self.args.stop_kl, self.values["objective/kl"][-1]
        if limit is not None and kl > limit:
            reason = f"objective/kl is {kl:.4g} nats per completion, above stop_kl = {limit:g}"
            raise self.unusable_rollouts(step, reason, TRY_SMALLER_STEPS)

    def unusable_rollouts(self, step: int, reason: str, advice: str = TRY_FINITE) -> TrainingStopped:
        """Set aside the checkpoint of weights whose rollouts are unusable after `step` steps; returns the error."""
        stop = self._stopped(step, reason, advice, before=step)
        if self.args.should_save:
            set_aside(Path(self.args.output_dir), step)
        return stop

    def gradient_done(self, step: int, norm: Tensor | float | None) -> None:
        """Check the gradient, whose norm is None if it is not known yet, before the optimizer uses it.

        Raises:
            TrainingStopped: if the gradient or a loss is not finite; with float16 once the scaler has skipped
                `SCALER_PATIENCE` steps in a row for it.
        """
        if norm is not None and self.broken is None:
            self._check("grad_norm", float(norm))
        self.bad_steps = self.bad_steps + 1 if self.broken is not None else 0
        if self.broken is not None and self.bad_steps >= self.patience:
            raise self._stopped(step, self.broken, TRY_FINITE)
        self.broken = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the end of an iteration, before a checkpoint is saved: check the weights, then warn."""
        if state.global_step % self.steps:
            return
        if not self.all_finite():
            raise self._stopped(state.global_step - 1, "a weight is not a finite number", TRY_FINITE)
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values.clear()
        for text in self.warnings.iteration(means):
            if state.is_world_process_zero:
                self.warn(f"warning: iteration {state.global_step // self.steps}: {text}")

    def _stopped(self, step: int, reason: str, advice: str, before: float = math.inf) -> TrainingStopped:
        checkpoint = last_checkpoint(Path(self.args.output_dir), before)
        last = f"last good checkpoint: {checkpoint}" if checkpoint else "there is no good checkpoint yet"
        return TrainingStopped(
            f"Training stopped in iteration {step // self.steps + 1}, after {step} optimizer steps: {reason}.\n"
            f"  - {last}\n  - try {advice}"
        )


def share_of_most_frequent(completion_ids: list[list[int]]) -> float:
    """Share of the completions that equal the most frequent one, by token ids."""
    return max(Counter(map(tuple, completion_ids)).values()) / len(completion_ids)


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether every element of every tensor is finite, as a bool scalar on their device."""
    return torch.stack([item.isfinite().all() for item in tensors]).all()
