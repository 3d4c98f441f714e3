"""Policy and value loss of one micro-batch, with their metrics."""

from __future__ import annotations

from torch import Tensor

from instructgpt_hf.functional import masked_mean, policy_loss, value_loss
from instructgpt_hf.models.actor_critic import ActorCriticOutput
from instructgpt_hf.trainers.ppo.rollouts import MicroBatch

Term = tuple[Tensor, dict[str, Tensor]]


def policy_term(output: ActorCriticOutput, batch: MicroBatch, low: float, high: float, steps: int) -> Term:
    """Clipped policy loss of a micro-batch.

    Args:
        output: log-probabilities and entropy [B, T] of the policy being trained.
        batch: the micro-batch.
        low: the probability ratio is clipped at 1 - low.
        high: and at 1 + high.
        steps: micro-batches of a minibatch.

    Returns:
        The loss, and metrics whose means over the micro-batches are those of the minibatch.
    """
    assert output.logps is not None and output.entropy is not None
    rollouts, mask = batch.rollouts, batch.rollouts.tokens.completion_mask
    result = policy_loss(output.logps, rollouts.logps, rollouts.advantages, mask, low, high, batch.policy_denominator)
    weight = _weight(batch, steps)
    return result.loss, {
        "loss/policy": result.loss * steps,
        "policy/clip_fraction": result.clip_fraction * weight,
        "policy/approx_kl": result.approx_kl * weight,
        "policy/ratio": result.ratio_mean * weight,
        "objective/entropy": masked_mean(output.entropy, mask) * weight,
    }


def value_term(output: ActorCriticOutput, batch: MicroBatch, clip: float, steps: int) -> Term:
    """Clipped value loss of a micro-batch.

    Args:
        output: values [B, T] of the value model being trained.
        batch: the micro-batch.
        clip: how far values may move from those of the rollouts.
        steps: micro-batches of a minibatch.

    Returns:
        The loss, and metrics as in `policy_term`.
    """
    assert output.values is not None
    rollouts, mask = batch.rollouts, batch.rollouts.tokens.completion_mask
    result = value_loss(output.values, rollouts.values, rollouts.returns, mask, clip, batch.value_denominator)
    return result.loss, {
        "loss/value": result.loss * steps,
        "val/clip_fraction": result.clip_fraction * _weight(batch, steps),
    }


def _weight(batch: MicroBatch, steps: int) -> Tensor | float:
    """Weight of this micro-batch's token means within its minibatch, times the number of micro-batches."""
    if batch.value_denominator is None:
        return 1.0
    return batch.rollouts.tokens.completion_mask.sum() / batch.value_denominator * steps
