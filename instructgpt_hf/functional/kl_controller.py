"""Adaptive weight of the KL penalty (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

InstructGPT does not use it: its weight is fixed (C.4).
"""

from __future__ import annotations

# How far, as a share of the target, one observation may be off before it counts as that far.
ERROR_LIMIT = 0.2


def adapted_kl_weight(beta: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The weight for the next batch of rollouts: `beta * (1 + error * episodes / horizon)`.

    `error = clip((kl - target) / target, -0.2, 0.2)`: proportional control of log beta. A KL that stays far from its
    target changes the weight by a fifth within `horizon` episodes.

    Args:
        beta: weight that the batch was rewarded with; 0 stays 0.
        kl: mean KL to the reference of the batch, nats per completion.
        target: the KL to hold, nats per completion; ValueError unless above 0.
        episodes: completions of the batch.
        horizon: completions over which the weight follows; ValueError unless above a fifth of `episodes`, below which
            the weight could turn negative.
    """
    if target <= 0.0:
        raise ValueError(f"Expected a KL target above 0, got {target}.")
    if horizon <= ERROR_LIMIT * episodes:
        least = f"{ERROR_LIMIT * episodes:g} for {episodes} episodes"
        raise ValueError(f"Expected a horizon above {least}, got {horizon}.")
    error = min(max((kl - target) / target, -ERROR_LIMIT), ERROR_LIMIT)
    return beta * (1.0 + error * episodes / horizon)
