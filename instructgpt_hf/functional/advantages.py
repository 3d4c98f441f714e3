"""From scores to advantages: the bandit reward of InstructGPT section 3.5, token by token, and GAE.

Batches are [B, T] completions; `mask` [B, T] is 1 on the tokens that count. Where the functions say right-padded, a
row is one token or more that count and then padding; any other row is a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from instructgpt_hf.functional.masked import check_same_shape, masked_whiten


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of every token: -beta times its KL term, and on the last unmasked token also the reward model's score.

    Summed over a row this is the bracket of equation 2. The paper does not say where the score is added; the last
    token is where lm-human-preferences adds it, and with gamma = 1 the return of every token is the same anywhere.

    Args:
        scores: [B] reward model scores.
        kl: [B, T] estimate of log(policy / reference) of every token, in nats.
        mask: [B, T] right-padded.
        beta: KL coefficient (InstructGPT C.4: 0.02).

    Returns:
        [B, T] in the dtype of `kl`, 0 outside the mask.
    """
    check_same_shape(kl=kl, mask=mask)
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"Expected one score per row, got scores {list(scores.shape)}, kl {list(kl.shape)}.")
    mask = _prefix_mask(mask)
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype)[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equation 16).

    `A_t = sum over l of (gamma * lam)^l * delta_{t+l}` with `delta_t = r_t + gamma * V_{t+1} - V_t`; the episode ends
    after the last unmasked token, so the value after it is 0. InstructGPT uses no discount (gamma = 1, C.4) and does
    not state lambda (Stiennon et al. 2020, B.1: 0.95).

    Args:
        rewards: [B, T].
        values: [B, T], the value function before each token.
        mask: [B, T] right-padded.
        gamma: discount.
        lam: 0 is one-step temporal difference, 1 is Monte Carlo.

    Returns:
        advantages: [B, T], not whitened.
        returns: [B, T], advantages + values: the value function's targets. Both are 0 outside the mask.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    mask = _prefix_mask(mask)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def whiten_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards [B, T] of variance 1 with the same mean, 0 outside the mask (lm-human-preferences; off by default)."""
    return masked_whiten(rewards, mask, shift_mean=False)


def _prefix_mask(mask: Tensor) -> Tensor:
    """The mask as bool, checked to be right-padded."""
    prefix = mask.bool()
    if prefix.ndim != 2 or prefix.shape[1] == 0:
        raise ValueError(f"Expected a [B, T] mask with T >= 1, got {list(mask.shape)}.")
    broken = ~prefix[:, 0] | (prefix[:, 1:] & ~prefix[:, :-1]).any(1)
    if bool(broken.any()):
        rows = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"Expected a right-padded mask with a 1 in every row, got {list(mask.shape)} "
            f"with {len(rows)} other rows, the first is row {rows[0]}."
        )
    return prefix
