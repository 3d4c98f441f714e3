"""Equal numbers to TRL 1.12.0, the last release with PPO; data/make_trl_1_12_numbers.py wrote them from its source.

TRL adds the score one position after the last token where there is room and keeps a value there, so its rewards and
values have a mask one token longer than its policy loss.
"""

import json
from pathlib import Path

import pytest
import torch

from instructgpt_hf.functional import (
    all_pairs_loss,
    gae,
    kl_estimate,
    log_probs_and_entropy,
    masked_mean,
    masked_var,
    masked_whiten,
    policy_loss,
    token_log_probs,
    token_rewards,
    value_loss,
    whiten_rewards,
)

NUMBERS = json.loads((Path(__file__).parent / "data" / "trl_1_12.json").read_text(encoding="utf-8"))


def tensors(case, part):
    values = {name: torch.tensor(value) for name, value in case[part].items()}
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


@pytest.fixture(autouse=True)
def _float64():
    # JSON numbers become float64 tensors, not rounded to float32 on the way.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_numbers_are_from_the_release_they_claim():
    assert NUMBERS["versions"]["trl"] == "1.12.0"


@pytest.mark.parametrize("case", NUMBERS["advantages"], ids=["full", "ragged", "gamma, lambda, k3", "whitened"])
def test_rewards_advantages_and_returns(case):
    settings, given, masks, expected = (
        case["settings"],
        *(tensors(case, key) for key in ("inputs", "masks", "outputs")),
    )
    mask, value_mask = masks["mask"], masks["value_mask"]
    kl = kl_estimate(given["logprobs"], given["ref_logprobs"], settings["kl_estimator"])
    kl = torch.where(mask, kl, 0.0)
    torch.testing.assert_close(kl, expected["kl"])
    rewards = token_rewards(given["scores"], kl, value_mask, settings["kl_coef"])
    if settings["whiten_rewards"]:
        rewards = whiten_rewards(rewards, value_mask)
    torch.testing.assert_close(rewards, expected["rewards"])
    advantages, returns = gae(rewards, given["values"], value_mask, settings["gamma"], settings["lam"])
    torch.testing.assert_close(advantages, expected["raw_advantages"])
    torch.testing.assert_close(returns, expected["returns"])
    torch.testing.assert_close(masked_whiten(advantages, mask), expected["advantages"])


@pytest.mark.parametrize("case", NUMBERS["losses"], ids=["full", "ragged"])
def test_policy_and_value_loss_with_gradients(case):
    settings, given, masks, expected = (
        case["settings"],
        *(tensors(case, key) for key in ("inputs", "masks", "outputs")),
    )
    logps, values = given["logps"].requires_grad_(), given["values"].requires_grad_()
    clip = settings["cliprange"]
    policy = policy_loss(logps, given["old_logps"], given["advantages"], masks["mask"], clip, clip)
    value = value_loss(values, given["old_values"], given["returns"], masks["value_mask"], settings["cliprange_value"])
    torch.testing.assert_close(policy.loss, expected["pg_loss"])
    torch.testing.assert_close(policy.clip_fraction, expected["pg_clipfrac"])
    torch.testing.assert_close(value.loss, expected["vf_loss"])
    # TRL computes this one in float32.
    torch.testing.assert_close(value.clip_fraction.float(), expected["vf_clipfrac"].float())
    loss = policy.loss + settings["vf_coef"] * value.loss
    torch.testing.assert_close(loss, expected["loss"])
    logps_gradient, values_gradient = torch.autograd.grad(loss, (logps, values))
    torch.testing.assert_close(logps_gradient, expected["logps_gradient"])
    torch.testing.assert_close(values_gradient, expected["values_gradient"])


@pytest.mark.parametrize("case", NUMBERS["whitening"], ids=["shifted", "scaled only"])
def test_whitening(case):
    values, mask, expected = (
        tensors(case, "inputs")["values"],
        tensors(case, "masks")["mask"],
        tensors(case, "outputs"),
    )
    torch.testing.assert_close(masked_mean(values, mask), expected["mean"])
    torch.testing.assert_close(masked_var(values, mask), expected["var"])
    torch.testing.assert_close(masked_var(values, mask, unbiased=True), expected["var_unbiased"])
    # TRL leaves numbers outside the mask; they are 0 here.
    whitened = masked_whiten(values, mask, case["settings"]["shift_mean"])
    torch.testing.assert_close(whitened, torch.where(mask, expected["whitened"], 0.0))


@pytest.mark.parametrize("case", NUMBERS["tokens"], ids=["temperature 1", "temperature 0.7"])
def test_log_probabilities_and_entropy(case):
    given, expected, temperature = tensors(case, "inputs"), tensors(case, "outputs"), case["settings"]["temperature"]
    torch.testing.assert_close(token_log_probs(given["logits"], given["ids"], temperature), expected["logps"])
    _, entropy = log_probs_and_entropy(given["logits"], given["ids"], temperature)
    torch.testing.assert_close(entropy, expected["entropy"])


@pytest.mark.parametrize("case", NUMBERS["ranking"], ids=["K = 2", "K = 4", "K = 9 with ties"])
def test_all_pairs_loss_is_the_pairwise_loss_of_every_pair(case):
    scores, expected = tensors(case, "inputs")["scores"].requires_grad_(), tensors(case, "outputs")
    ranks = torch.tensor(case["settings"]["ranks"])
    (loss,) = all_pairs_loss(scores, ranks, torch.zeros_like(ranks))
    torch.testing.assert_close(loss, expected["loss"])
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], expected["gradient"])
