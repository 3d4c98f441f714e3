"""Policy and value loss of one micro-batch of a minibatch, and what the log says of them."""

from __future__ import annotations

from torch import Tensor

from instructgpt_hf.functional import masked_mean, policy_loss, value_loss
from instructgpt_hf.models.actor_critic import ActorCriticOutput
from instructgpt_hf.trainers.ppo.rollouts import Batch

Term = tuple[Tensor, dict[str, Tensor]]


def policy_term(output: ActorCriticOutput, inputs: Batch, low: float, high: float, steps: int) -> Term:
    """The clipped policy loss.

    Args:
        output: log-probabilities and entropy [B, T] of the policy as it is.
        inputs: the micro-batch: rollouts, and under `policy_denominator` and `denominator` what the losses of its
            minibatch are divided by; without them, it is a minibatch of its own.
        low: the probability ratio is clipped at 1 - low.
        high: and at 1 + high.
        steps: micro-batches of a minibatch.

    Returns:
        The loss, and metrics whose means over the micro-batches are those of the minibatch.
    """
    assert output.logps is not None and output.entropy is not None
    mask = inputs["completion_mask"]
    found = policy_loss(
        output.logps, inputs["logps"], inputs["advantages"], mask, low, high, inputs.get("policy_denominator")
    )
    share = _share(inputs, steps)
    return found.loss, {
        "loss/policy": found.loss * steps,
        "policy/clip_fraction": found.clip_fraction * share,
        "policy/approx_kl": found.approx_kl * share,
        "policy/ratio": found.ratio_mean * share,
        "objective/entropy": masked_mean(output.entropy, mask) * share,
    }


def value_term(values: Tensor, inputs: Batch, clip: float, steps: int) -> Term:
    """The clipped value loss.

    Args:
        values: [B, T] of the value model as it is.
        inputs: as for `policy_term`.
        clip: how far values may move from those of the rollouts.
        steps: micro-batches of a minibatch.

    Returns:
        The loss, and metrics as in `policy_term`.
    """
    mask, denominator = inputs["completion_mask"], inputs.get("denominator")
    found = value_loss(values, inputs["values"], inputs["returns"], mask, clip, denominator)
    return found.loss, {
        "loss/value": found.loss * steps,
        "val/clip_fraction": found.clip_fraction * _share(inputs, steps),
    }


def _share(inputs: Batch, steps: int) -> Tensor | float:
    """What a micro-batch's means count by: its tokens, as in the losses."""
    denominator = inputs.get("denominator")
    return 1.0 if denominator is None else inputs["completion_mask"].sum() / denominator * steps
