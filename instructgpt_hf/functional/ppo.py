"""The losses of PPO and PPO-ptx, token by token.

Batches are [B, T] completions; `mask` [B, T] is 1 on the tokens that count. Values outside the mask are never used:
they may hold anything, NaN and infinity included.

A loss is the sum over unmasked tokens divided by `denominator`, by default their number. `loss_denominator` gives the
one of a reduction: with that of the whole minibatch, the losses and gradients of its micro-batches add up to those of
the minibatch exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from instructgpt_hf.functional.log_probs import token_log_probs
from instructgpt_hf.functional.masked import check_same_shape, masked_mean, masked_var


class PolicyLoss(NamedTuple):
    """Scalars. Only `loss` carries a gradient; the others are means over the unmasked tokens of this call.

    `clip_fraction` is the share of tokens whose gradient the clip removed, `approx_kl` the k3 estimate of
    KL(rollout policy, present policy) in nats per token, `ratio_mean` the mean probability ratio.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor


class ValueLoss(NamedTuple):
    """Scalars. Only `loss` carries a gradient; the others are over the unmasked tokens of this call.

    `clip_fraction` is the share of tokens where the clipped error is the larger one.
    """

    loss: Tensor
    clip_fraction: Tensor


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k1") -> Tensor:
    """Estimate of KL(policy, reference) from one sampled token (Schulman 2020, "Approximating KL divergence").

    Both are unbiased for tokens sampled from the policy. k1, the log ratio, is what equation 2 of InstructGPT
    subtracts; k3, `ratio - 1 - log ratio` with ratio = reference / policy, is never negative and varies less, but its
    gradient as a reward is another one.

    Args:
        logps: log-probabilities under the policy, any shape.
        ref_logps: log-probabilities under the reference, the same shape.
        kind: `"k1"` or `"k3"`; any other is a ValueError.

    Returns:
        Nats per token, the same shape; meaningless on padding.
    """
    check_same_shape(logps=logps, ref_logps=ref_logps)
    log_ratio = logps - ref_logps
    if kind == "k1":
        return log_ratio
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"Expected a KL estimator 'k1' or 'k3', got {kind!r}.")


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    denominator: Tensor | float | None = None,
) -> PolicyLoss:
    """Clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7), per token, to be minimised.

    Args:
        logps: [B, T] log-probabilities under the policy being trained.
        old_logps: [B, T] log-probabilities at rollout time.
        advantages: [B, T].
        mask: [B, T].
        clip_low: the ratio is clipped below at 1 - clip_low (InstructGPT C.4: 0.2).
        clip_high: and above at 1 + clip_high.
        denominator: divisor of the sum over unmasked tokens.
    """
    check_same_shape(logps=logps, old_logps=old_logps, advantages=advantages, mask=mask)
    mask = mask.bool()
    # Masked before the exponential: infinity outside the mask would turn into NaN in the gradient.
    log_ratio = torch.where(mask, logps - old_logps, 0.0)
    ratio = torch.exp(log_ratio)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = _over_tokens(torch.max(unclipped, clipped), mask, denominator)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            clip_fraction=masked_mean((clipped > unclipped).to(ratio.dtype), mask),
            approx_kl=masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
            ratio_mean=masked_mean(ratio, mask),
        )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    denominator: Tensor | float | None = None,
) -> ValueLoss:
    """Half the squared error of the value function, the larger of the unclipped and the clipped prediction's.

    The paper does not state it; this is the form of lm-human-preferences and of TRL 1.12.

    Args:
        values: [B, T] from the value function being trained.
        old_values: [B, T] at rollout time.
        returns: [B, T] targets.
        mask: [B, T].
        clip: how far a prediction may move from `old_values` before its loss stops falling, in units of reward;
            infinity switches clipping off.
        denominator: divisor of the sum over unmasked tokens.
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, item, 0.0) for item in (values, old_values, returns))
    limited = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (limited - returns).square()
    loss = _over_tokens(0.5 * torch.max(unclipped, clipped), mask, denominator)
    with torch.no_grad():
        # Inside the range the two differ by rounding only.
        limits = (clipped > unclipped) & ((values - old_values).abs() > clip)
        return ValueLoss(loss=loss, clip_fraction=masked_mean(limits.to(values.dtype), mask))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the unmasked tokens: 1 is perfect, below 0 worse than a constant.

    The result is a scalar, 0 where the empirical returns [B, T] do not vary.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    spread = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, 1.0 - unexplained, 0.0)


def lm_loss(logits: Tensor, ids: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Next-token cross entropy of pretraining text: the negative of the last term of equation 2, without gamma.

    Args:
        logits: [B, T, V] of the whole sequences; `logits[:, t]` predicts `ids[:, t + 1]`.
        ids: [B, T].
        mask: [B, T], padded on either side.
        denominator: divisor of the sum over predicted tokens, `predicted_mask(mask)`. The number of sequences makes it
            the sum over tokens that equation 2 writes.

    Returns:
        A scalar, nats.
    """
    check_same_shape(ids=ids, mask=mask)
    counted = predicted_mask(mask)
    # The targets move, not the logits: a slice of the logits would cost a second [B, T, V] gradient.
    targets = torch.where(counted, ids, 0).roll(-1, dims=1)
    counted = counted.roll(-1, dims=1)
    return _over_tokens(-token_log_probs(logits, targets), counted, denominator)


def loss_denominator(mask: Tensor, reduction: str) -> Tensor:
    """Denominator of a sum of token losses; the denominators of micro-batches add up to that of their minibatch.

    `token_mean` divides by the tokens, so that every token weighs the same and the loss is in units per token.
    `sequence_sum` divides by the sequences: the mean over sequences of the sum over a sequence's tokens, which is the
    estimate of an expectation over whole completions or texts as equation 2 of InstructGPT writes it. Within a
    minibatch the two differ by one factor, the mean length.

    The result is a scalar, at least 1; another reduction is a ValueError.
    """
    if reduction == "token_mean":
        return mask.bool().sum().clamp(min=1)
    if reduction == "sequence_sum":
        return mask.new_tensor(max(1, mask.shape[0]), dtype=torch.long)
    raise ValueError(f"Expected a reduction 'token_mean' or 'sequence_sum', got {reduction!r}.")


def ppo_ptx_loss(
    policy: Tensor, value: Tensor, vf_coef: float, lm: Tensor | float = 0.0, ptx_coef: float = 0.0
) -> Tensor:
    """Equation 2 of InstructGPT as one sum to be minimised: PPO's surrogate, its value loss, and the pretraining term.

    The policy loss has on average the gradient of equation 2's bracket, score minus KL penalty; the last term is
    gamma times the expectation of log pi(x). PPO adds the value loss, which trains no weight of the policy.

    Args:
        policy: loss of `policy_loss`.
        value: loss of `value_loss`.
        vf_coef: weight of the value loss.
        lm: `lm_loss` of pretraining text.
        ptx_coef: gamma of equation 2 (C.4: 27.8); 0 is plain PPO.
    """
    return policy + vf_coef * value + ptx_coef * lm


def predicted_mask(mask: Tensor) -> Tensor:
    """Bool [B, T]: the tokens that `lm_loss` counts: unmasked ones that follow an unmasked token."""
    mask = mask.bool()
    counted = mask.clone()
    counted[:, :1] = False
    counted[:, 1:] &= mask[:, :-1]
    return counted


def _over_tokens(losses: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Sum of the unmasked tokens' losses over `denominator`, their number by default."""
    total = torch.where(mask, losses, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if denominator is None else denominator)
