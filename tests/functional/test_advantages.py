"""Rewards and GAE against the sums of their definitions."""

import pytest
import torch

from instructgpt_hf.functional import gae, token_rewards, whiten_rewards

LENGTHS = [6, 1, 4]


def case(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6)[None, :] < torch.tensor(LENGTHS)[:, None]
    junk = torch.tensor(float("nan"), dtype=torch.float64)
    return torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gae_is_the_double_sum_of_equation_16(seed, gamma, lam):
    rewards, values, mask = case(seed)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        value = [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            for step in range(length - t):
                delta = rewards[row, t + step].item() + gamma * value[t + step + 1] - value[t + step]
                expected[row, t] += (gamma * lam) ** step * delta
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values.nan_to_num(0.0))


def test_lambda_one_returns_are_the_discounted_rewards_to_come():
    rewards, values, mask = case(4)
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            to_come = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, length))
            torch.testing.assert_close(returns[row, t].item(), to_come)


def test_token_rewards_by_loop():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, generator=generator, dtype=torch.float64)
    kl, _, mask = case(1)
    rewards = token_rewards(scores, kl, mask, beta=0.3)
    for row, length in enumerate(LENGTHS):
        expected = [-0.3 * kl[row, t].item() for t in range(length)] + [0.0] * (6 - length)
        expected[length - 1] += scores[row].item()
        torch.testing.assert_close(rewards[row].tolist(), expected)


def test_token_rewards_sum_to_the_bracket_of_equation_2():
    kl, _, mask = case(2)
    scores = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = scores - 0.02 * kl.nan_to_num(0.0).sum(1)
    torch.testing.assert_close(token_rewards(scores, kl, mask, beta=0.02).sum(1), expected)


def test_whitened_rewards_keep_their_mean():
    rewards, _, mask = case(3)
    whitened, real = whiten_rewards(rewards, mask), rewards[mask]
    torch.testing.assert_close(whitened[mask].mean(), real.mean())
    torch.testing.assert_close(whitened[mask].std(), torch.tensor(1.0, dtype=torch.float64))
    assert whitened[~mask].abs().max() == 0


@pytest.mark.parametrize(
    "mask",
    [[[0, 1, 1], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 1]]],
    ids=["left-padded", "empty row", "hole"],
)
def test_other_masks_are_refused(mask):
    mask = torch.tensor(mask)
    with pytest.raises(ValueError, match=r"right-padded mask.*\[2, 3\].*row [01]\."):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="right-padded mask"):
        token_rewards(torch.zeros(2), torch.zeros(2, 3), mask, 0.02)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"rewards \[2, 3\], values \[2, 4\]"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3), 1.0, 0.95)
    with pytest.raises(ValueError, match=r"scores \[3\], kl \[2, 3\]"):
        token_rewards(torch.zeros(3), torch.zeros(2, 3), torch.ones(2, 3), 0.02)
