"""How far a policy has moved from its reference, in nats per answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instructgpt_hf.evaluation.intervals import Estimate, bootstrap_mean
from instructgpt_hf.evaluation.scoring import continuation_log_probs
from instructgpt_hf.functional import kl_estimate


def sequence_kl(
    policy: Any,
    reference: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
) -> Estimate:
    """KL(policy, reference) per answer: the mean over answers of the summed log ratio, the quantity of equation 2.

    The estimate is unbiased when `completion_ids` were sampled from the policy at this temperature, EOS included.

    Args:
        policy: a causal language model, or a callable like one (see `continuation_log_probs`).
        reference: the same; the SFT model in InstructGPT.
        prompt_ids: N lists of tokens.
        completion_ids: N lists of tokens sampled from the policy.
        batch_size: sequences per forward pass.
        temperature: of the sampling.
        seed: of the bootstrap.

    Returns:
        Nats per answer with the 95 % bootstrap interval over answers. A small sample may give a value below 0.

    Raises:
        ValueError: if the numbers of prompts and completions differ or one of them is empty.
    """
    first, second = (
        continuation_log_probs(model, prompt_ids, completion_ids, batch_size, temperature)
        for model in (policy, reference)
    )
    sums = [kl_estimate(a, b, "k1").sum().item() for a, b in zip(first, second, strict=True)]
    return bootstrap_mean(sums, seed)
