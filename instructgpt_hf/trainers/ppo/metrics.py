"""Metrics of an iteration's rollouts and phases; docs/ppo.md has the formulas."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.functional import explained_variance
from instructgpt_hf.trainers.ppo.rollouts import Rollouts, TokenLists, gather_rows
from instructgpt_hf.trainers.ppo.watchdog import share_of_most_frequent


def rollout_metrics(
    rollouts: Rollouts,
    ref_logps: Tensor,
    kl: Tensor,
    scores: Tensor,
    finished: Tensor,
    completion_ids: TokenLists,
    beta: float,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Metrics by name over the episodes of all processes; the arguments are of this process's episodes.

    `ref_logps` and `kl`, the terms of the penalty, are [B, T]; `scores`, and `finished` for completions with EOS, [B].
    """
    mask = rollouts.tokens.completion_mask
    penalty = (kl * mask).sum(1) * beta
    rows = {
        "objective/scores": scores,
        "objective/kl": ((rollouts.logps - ref_logps) * mask).sum(1),
        "objective/rlhf_reward": scores - penalty,
        "objective/kl_penalty": penalty,
        "completions/eos_rate": finished.float(),
        "val/mean_value": rollouts.values.sum(1) / mask.sum(1),
    }
    columns = accelerator.gather(torch.stack(list(rows.values()), dim=1))
    all_scores = columns[:, 0].contiguous()
    gathered = gather_rows(accelerator, rollouts.values, rollouts.returns, mask)
    return {
        **dict(zip(rows, columns.mean(0).tolist(), strict=True)),
        "completions/most_frequent": share_of_most_frequent(gather_object(completion_ids)),
        "objective/beta": beta,
        "objective/scores_std": all_scores.std(unbiased=False).item(),
        "val/explained_variance": explained_variance(*gathered).item(),
    }


@dataclass(eq=False)
class PhaseClock(TrainerCallback):
    """Callback that records seconds and tokens per second of an iteration's phases, each from the end of the last.

    Attributes:
        steps: optimizer steps of an iteration; the last one ends the phase "train".
        record: called with a metric's name and value.
        now: monotonic clock in seconds.
        training_tokens: tokens of the current iteration's optimizer steps.
        started: when the present phase started; None outside an iteration.
    """

    steps: int
    record: Callable[[str, float], None]
    now: Callable[[], float] = time.perf_counter
    training_tokens: float = 0.0
    started: float | None = None

    def start(self) -> None:
        """Start an iteration."""
        self.started = self.now()

    def end(self, phase: str, tokens: float) -> None:
        """End a phase that processed `tokens`, over all processes, and start the next one.

        Outside an iteration nothing is recorded. Devices work asynchronously: call it where results have reached the
        host.
        """
        if self.started is None:
            return
        now = self.now()
        seconds, self.started = now - self.started, now
        self.record(f"time/{phase}", seconds)
        self.record(f"throughput/{phase}", tokens / max(seconds, 1e-9))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the iteration after its last optimizer step."""
        if state.global_step % self.steps == 0:
            self.end("train", self.training_tokens)
            self.started = None


def count_tokens(prompt_ids: TokenLists, completion_ids: TokenLists, accelerator: Accelerator) -> tuple[int, int]:
    """Completion tokens, and prompt and completion tokens together, over all processes."""
    sampled = sum(map(len, completion_ids))
    counts = torch.tensor([sampled, sampled + sum(map(len, prompt_ids))], device=accelerator.device)
    first, second = accelerator.reduce(counts, reduction="sum").tolist()
    return first, second


def training_tokens(args: PPOConfig, tokens: int, value_only: bool) -> int:
    """Tokens of an iteration's optimizer steps: rollouts (`tokens`) and pretraining examples, in all inner epochs."""
    examples = args.ptx_episodes_ratio * args.generation_batch_size if args.ptx_coef and not value_only else 0
    return int(args.num_iterations * (tokens + examples * args.ptx_max_length))
