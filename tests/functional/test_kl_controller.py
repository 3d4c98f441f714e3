"""The adaptive weight of the KL penalty against values worked out by hand (Ziegler et al. 2019, section 2.2)."""

import pytest

from instructgpt_hf.functional import adapted_kl_weight


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target: unchanged
        (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),  # a tenth above
        (5.4, 0.1 * (1 - 0.1 * 512 / 10_000)),  # a tenth below
        (60.0, 0.1 * (1 + 0.2 * 512 / 10_000)),  # far above: counts as a fifth
        (0.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
        (-3.0, 0.1 * (1 - 0.2 * 512 / 10_000)),  # an estimate can be negative
    ],
)
def test_one_batch(kl, expected):
    assert adapted_kl_weight(0.1, kl, target=6.0, episodes=512, horizon=10_000) == pytest.approx(expected, rel=1e-12)


def test_a_kl_far_from_its_target_changes_the_weight_by_a_fifth_in_a_horizon():
    beta = 0.05
    for _ in range(100):
        beta = adapted_kl_weight(beta, 100.0, target=6.0, episodes=100, horizon=10_000)
    assert beta == pytest.approx(0.05 * (1 + 0.2 / 100) ** 100, rel=1e-9)
    assert 1.2 < beta / 0.05 < 1.23


@pytest.mark.parametrize("arguments", [dict(target=0.0, horizon=1000), dict(target=6.0, horizon=20)])
def test_settings_that_could_turn_the_sign_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected a"):
        adapted_kl_weight(0.1, 1.0, episodes=100, **arguments)
