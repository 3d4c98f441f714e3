"""The moving average of weights against its closed form."""

import pytest
import torch

from instructgpt_hf.trainers.ppo.ema import ema_update


def test_closed_form():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    steps = torch.randn(7, 4, 3, generator=generator, dtype=torch.float64)
    average = start.clone()
    for param in steps:
        ema_update([average], [param], 0.992)
    expected = 0.992**7 * start + sum(0.008 * 0.992 ** (6 - step) * param for step, param in enumerate(steps))
    torch.testing.assert_close(average, expected)


def test_in_place_and_without_gradient():
    average, param = torch.zeros(2), torch.ones(2, requires_grad=True)
    before = average.data_ptr()
    ema_update([average], [param], 0.75)
    assert average.tolist() == [0.25, 0.25]
    assert average.data_ptr() == before
    assert not average.requires_grad


def test_float32_average_of_bfloat16_weights_does_not_stall():
    average, param = torch.ones(1), torch.full((1,), 1.125, dtype=torch.bfloat16)
    for _ in range(1000):
        ema_update([average], [param], 0.992)
    torch.testing.assert_close(average, torch.tensor([1.125 - 0.125 * 0.992**1000]))


@pytest.mark.parametrize("decay, expected", [(0.0, 5.0), (1.0, 2.0)])
def test_ends_of_the_range(decay, expected):
    average = torch.full((1,), 2.0)
    ema_update([average], [torch.full((1,), 5.0)], decay)
    assert average.item() == expected


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"decay in \[0, 1\], got 1.2"):
        ema_update([], [], 1.2)
    with pytest.raises(ValueError, match="1 averages for 2 params"):
        ema_update([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], 0.9)
    with pytest.raises(ValueError, match="equal shapes"):
        ema_update([torch.zeros(1)], [torch.zeros(2)], 0.9)
