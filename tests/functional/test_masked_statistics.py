"""masked.py against numpy on the real values alone."""

import numpy as np
import pytest
import torch

from instructgpt_hf.functional import masked_mean, masked_var, masked_whiten


def case(seed, shape=(3, 7)):
    """Random values with junk outside a mask that leaves at least two real ones."""
    generator = torch.Generator().manual_seed(seed)
    values = 4 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, :2] = True
    junk = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e300], dtype=torch.float64)
    junk = junk[torch.randint(0, 4, shape, generator=generator)]
    return torch.where(mask, values, junk), mask


@pytest.mark.parametrize("seed", range(5))
def test_statistics_equal_numpy(seed):
    values, mask = case(seed)
    real = values[mask].numpy()
    torch.testing.assert_close(masked_mean(values, mask).item(), real.mean().item())
    torch.testing.assert_close(masked_var(values, mask).item(), real.var().item())
    torch.testing.assert_close(masked_var(values, mask, unbiased=True).item(), real.var(ddof=1).item())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mean_by_dimension_for_any_mask_type(dtype):
    values, mask = case(1)
    means = masked_mean(values, mask.to(dtype), dim=1)
    expected = [row[keep].mean() for row, keep in zip(values.numpy(), mask.numpy(), strict=True)]
    torch.testing.assert_close(means, torch.tensor(np.array(expected)))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_whitening_equals_numpy(seed, shift_mean):
    values, mask = case(seed)
    real = values[mask].numpy()
    expected = np.zeros(values.shape)
    expected[mask.numpy()] = (real - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8) + (
        0 if shift_mean else real.mean()
    )
    torch.testing.assert_close(masked_whiten(values, mask, shift_mean), torch.tensor(expected))


def test_whitening_of_one_value_or_equal_values_is_finite():
    one = torch.tensor([[True, False]])
    assert masked_whiten(torch.tensor([[3.0, 9.0]]), one).tolist() == [[0.0, 0.0]]
    assert masked_whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)).abs().max() == 0


def test_nothing_real_gives_zero():
    values, mask = torch.full((2, 3), float("nan")), torch.zeros(2, 3)
    assert masked_mean(values, mask) == 0
    assert masked_mean(values, mask, dim=1).tolist() == [0, 0]
    assert masked_var(values, mask) == 0


def test_junk_outside_the_mask_gives_no_gradient():
    values, mask = case(2)
    values.requires_grad_()
    masked_whiten(values, mask).square().sum().backward()
    assert torch.isfinite(values.grad).all()
    assert values.grad[~mask].abs().max() == 0


def test_whitening_gradient_by_finite_differences():
    values = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda item: masked_whiten(item, mask), (values,))


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"values \[2, 3\], mask \[3\]"):
        masked_mean(torch.zeros(2, 3), torch.ones(3))
