"""The formulas of InstructGPT as functions of tensors: no configuration, no model, no state.

Arguments whose shapes do not fit are a ValueError that names the shapes; nothing is broadcast.
"""

from __future__ import annotations

from instructgpt_hf.functional.advantages import gae, token_rewards, whiten_rewards
from instructgpt_hf.functional.kl_controller import adapted_kl_weight
from instructgpt_hf.functional.log_probs import log_probs_and_entropy, token_log_probs
from instructgpt_hf.functional.masked import masked_mean, masked_var, masked_whiten
from instructgpt_hf.functional.ppo import (
    explained_variance,
    kl_estimate,
    lm_loss,
    loss_denominator,
    policy_loss,
    ppo_ptx_loss,
    predicted_mask,
    value_loss,
)
from instructgpt_hf.functional.ranking import all_pairs_loss, pair_counts, strict_pairs

__all__ = [
    "adapted_kl_weight",
    "all_pairs_loss",
    "explained_variance",
    "gae",
    "kl_estimate",
    "lm_loss",
    "log_probs_and_entropy",
    "loss_denominator",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pair_counts",
    "policy_loss",
    "ppo_ptx_loss",
    "predicted_mask",
    "strict_pairs",
    "token_log_probs",
    "token_rewards",
    "value_loss",
    "whiten_rewards",
]
