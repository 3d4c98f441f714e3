"""What PPO logs of an iteration's rollouts; docs/ppo.md has the formulas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from instructgpt_hf.functional import explained_variance, kl_estimate
from instructgpt_hf.trainers.ppo.rollouts import Batch
from instructgpt_hf.trainers.ppo.watchdog import share_of_most_frequent


def rollout_metrics(
    trainer: Any, batch: Batch, scores: Tensor, reference: Tensor, finished: Tensor, completion_ids: list[list[int]]
) -> dict[str, float]:
    """Metrics over the episodes of all processes, by name.

    Args:
        trainer: a PPO trainer.
        batch: this process's rollouts.
        scores: [B].
        reference: the reference's log-probabilities [B, T].
        finished: whether an answer ended with EOS [B].
        completion_ids: the sampled tokens.
    """
    accelerator, mask = trainer.accelerator, batch["completion_mask"]
    kl = ((batch["logps"] - reference) * mask).sum(1)
    penalty = (kl_estimate(batch["logps"], reference, trainer.args.kl_estimator) * mask).sum(1) * trainer.beta
    rows = {
        "objective/scores": scores,
        "objective/kl": kl,
        "objective/rlhf_reward": scores - penalty,
        "objective/kl_penalty": penalty,
        "completions/eos_rate": finished.float(),
        "val/mean_value": batch["values"].sum(1) / mask.sum(1),
    }
    means = accelerator.gather(torch.stack(list(rows.values()), dim=1)).mean(0).tolist()
    gathered = gather_rows(accelerator, batch["values"], batch["returns"], mask)
    return {
        **dict(zip(rows, means, strict=True)),
        "completions/most_frequent": share_of_most_frequent(gather_object(completion_ids)),
        "objective/beta": trainer.beta,
        "objective/scores_std": accelerator.gather(scores).std(unbiased=False).item(),
        "val/explained_variance": explained_variance(*gathered).item(),
    }


def gather_rows(accelerator: Any, *tensors: Tensor) -> list[Tensor]:
    """The rows [B, T] of all processes, padded to the longest."""
    return [accelerator.gather(accelerator.pad_across_processes(item, dim=1)) for item in tensors]


# Phase -> its metrics: seconds, tokens per second.
METRICS = {
    "generate": ("time/generate", "throughput/generate"),
    "score": ("time/score", "throughput/score"),
    "train": ("time/train", "throughput/train"),
}


class PhaseClock(TrainerCallback):
    """Wall-clock seconds between the ends of phases; each starts where the one before it ended.

    Args:
        steps: optimizer steps of an iteration, whose end ends the phase "train".
        record: takes a metric's name and value.
        now: seconds; a clock that never goes back.

    Attributes:
        training_tokens: tokens of the current iteration's optimizer steps.
    """

    def __init__(
        self, steps: int, record: Callable[[str, float], None], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.steps = steps
        self.record = record
        self.now = now
        self.started: float | None = None
        self.training_tokens = 0.0

    def start(self) -> None:
        """An iteration starts."""
        self.started = self.now()

    def end(self, phase: str, tokens: float) -> None:
        """`phase` ends and the next one starts; outside an iteration nothing is recorded.

        Devices work asynchronously: call it where results have reached the host.

        Args:
            phase: a key of `METRICS`.
            tokens: what the phase worked through, on all processes.
        """
        if self.started is None:
            return
        now = self.now()
        seconds, self.started = now - self.started, now
        time_name, rate_name = METRICS[phase]
        self.record(time_name, seconds)
        self.record(rate_name, tokens / max(seconds, 1e-9))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last optimizer step of an iteration ends it."""
        if state.global_step % self.steps == 0:
            self.end("train", self.training_tokens)
            self.started = None


def count_tokens(prompt_ids: list[list[int]], completion_ids: list[list[int]], accelerator: Any) -> tuple[int, int]:
    """Sampled tokens, and the same with their prompts, of all processes."""
    sampled = sum(map(len, completion_ids))
    counts = torch.tensor([sampled, sampled + sum(map(len, prompt_ids))], device=accelerator.device)
    first, second = accelerator.reduce(counts, reduction="sum").tolist()
    return first, second


def training_tokens(args: Any, tokens: int, value_only: bool) -> int:
    """Tokens that an iteration's optimizer steps work through: rollouts and pretraining examples, in all inner epochs.

    Args:
        args: `PPOConfig`.
        tokens: of the iteration's rollouts, prompts included.
        value_only: the iteration trains the value model alone.
    """
    examples = args.ptx_episodes_ratio * args.generation_batch_size if args.ptx_coef and not value_only else 0
    return int(args.num_iterations * (tokens + examples * args.ptx_max_length))
