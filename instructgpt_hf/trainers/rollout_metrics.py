"""What PPO logs of an iteration's rollouts; docs/ppo.md has the formulas."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from instructgpt_hf.functional import explained_variance, kl_estimate
from instructgpt_hf.trainers.guards import share_of_most_frequent
from instructgpt_hf.trainers.rollouts import Batch


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
