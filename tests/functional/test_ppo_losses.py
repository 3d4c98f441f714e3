"""PPO's losses against loops over tokens, finite differences, and the rules of masks and micro-batches."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from instructgpt_hf.functional import (
    explained_variance,
    kl_estimate,
    lm_loss,
    loss_denominator,
    policy_loss,
    predicted_mask,
    value_loss,
)

LENGTHS = [6, 1, 4]
JUNK = [float("nan"), float("inf"), -float("inf"), 1e308]


def case(seed, names):
    """Random [3, 6] tensors by name, with junk outside the mask, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6)[None, :] < torch.tensor(LENGTHS)[:, None]
    tensors = {}
    for number, name in enumerate(names):
        junk = torch.tensor(JUNK[number % 4], dtype=torch.float64)
        tensors[name] = torch.where(mask, torch.randn(3, 6, generator=generator, dtype=torch.float64), junk)
    return tensors, mask


def policy_case(seed=0):
    tensors, mask = case(seed, ["logps", "old_logps", "advantages"])
    tensors["logps"] = tensors["old_logps"] + 0.4 * tensors["logps"]
    return tensors, mask


def value_case(seed=0):
    tensors, mask = case(seed, ["values", "old_values", "returns"])
    tensors["values"] = tensors["old_values"] + 0.5 * tensors["values"]
    return tensors, mask


@pytest.mark.parametrize("seed", range(4))
def test_policy_loss_is_equation_7_token_by_token(seed):
    tensors, mask = policy_case(seed)
    terms, clipped, ratios, kls = [], 0, [], []
    for logp, old, advantage in zip(*(tensors[name][mask].tolist() for name in tensors), strict=True):
        ratio = math.exp(logp - old)
        limited = min(max(ratio, 1 - 0.1), 1 + 0.3)
        terms.append(-min(ratio * advantage, limited * advantage))
        clipped += (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.9)
        ratios.append(ratio)
        kls.append(ratio - 1 - math.log(ratio))
    result = policy_loss(**tensors, mask=mask, clip_low=0.1, clip_high=0.3)
    expected = [np.mean(terms), clipped / len(terms), np.mean(kls), np.mean(ratios)]
    torch.testing.assert_close([item.item() for item in result], [float(item) for item in expected])


@pytest.mark.parametrize("clip", [0.2, float("inf")])
@pytest.mark.parametrize("seed", range(4))
def test_value_loss_token_by_token(seed, clip):
    tensors, mask = value_case(seed)
    values, old_values, returns = (tensors[name][mask].numpy() for name in tensors)
    terms, clipped = [], 0
    for value, old, target in zip(values, old_values, returns, strict=True):
        free, limited = (value - target) ** 2, (min(max(value, old - clip), old + clip) - target) ** 2
        terms.append(0.5 * max(free, limited))
        clipped += limited > free
    result = value_loss(**tensors, mask=mask, clip=clip)
    expected = [np.mean(terms), clipped / len(terms)]
    torch.testing.assert_close([item.item() for item in result], [float(item) for item in expected])
    found = explained_variance(tensors["values"], tensors["returns"], mask).item()
    assert found == pytest.approx(1 - (returns - values).var() / returns.var(), rel=1e-5)


def test_sequence_sum_is_the_mean_over_completions_of_their_sums():
    tensors, mask = policy_case()
    completions = []
    for row, length in enumerate(LENGTHS):
        terms = []
        for logp, old, advantage in zip(*(tensors[name][row, :length].tolist() for name in tensors), strict=True):
            ratio = math.exp(logp - old)
            terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
        completions.append(sum(terms))
    denominator = loss_denominator(mask, "sequence_sum")
    result = policy_loss(**tensors, mask=mask, clip_low=0.2, clip_high=0.2, denominator=denominator)
    assert result.loss.item() == pytest.approx(np.mean(completions))


def test_denominators_by_value():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert [loss_denominator(mask, kind).item() for kind in ("token_mean", "sequence_sum")] == [5, 3]
    assert loss_denominator(torch.zeros(2, 3), "token_mean") == 1
    with pytest.raises(ValueError, match="'token_mean' or 'sequence_sum', got 'mean'"):
        loss_denominator(mask, "mean")


def test_explained_variance_of_constant_returns_is_zero():
    assert explained_variance(torch.randn(1, 3), torch.ones(1, 3), torch.ones(1, 3)) == 0


@pytest.mark.parametrize(
    "make, function, settings",
    [
        (policy_case, policy_loss, {"clip_low": 0.2, "clip_high": 0.2}),
        (value_case, value_loss, {"clip": 0.2}),
    ],
)
class TestBothLosses:
    def test_gradient_by_finite_differences(self, make, function, settings):
        tensors, mask = make(1)
        first = next(iter(tensors))
        real = tensors[first][mask].clone().requires_grad_()

        def loss(items):
            full = tensors[first].clone()
            full[mask] = items
            return function(**{**tensors, first: full}, mask=mask, **settings).loss

        assert torch.autograd.gradcheck(loss, (real,))

    def test_junk_outside_the_mask_changes_neither_result_nor_gradient(self, make, function, settings):
        results = []
        for junk in [0.0, *JUNK]:
            tensors, mask = make(2)
            tensors = {name: torch.where(mask, value, junk) for name, value in tensors.items()}
            first = next(iter(tensors))
            tensors[first].requires_grad_()
            result = function(**tensors, mask=mask, **settings)
            result.loss.backward()
            results.append((*result, tensors[first].grad))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)
        assert results[0][-1][~mask].abs().max() == 0

    def test_micro_batches_add_up(self, make, function, settings):
        tensors, mask = make(3)
        first = next(iter(tensors))
        tensors[first].requires_grad_()
        whole = function(**tensors, mask=mask, **settings).loss
        parts = [
            function(
                **{name: value[rows] for name, value in tensors.items()},
                mask=mask[rows],
                denominator=mask.sum(),
                **settings,
            ).loss
            for rows in ([0], [1, 2])
        ]
        torch.testing.assert_close(sum(parts), whole)
        gradients = [torch.autograd.grad(loss, tensors[first])[0] for loss in (sum(parts), whole)]
        torch.testing.assert_close(*gradients)

    def test_only_the_loss_carries_a_gradient(self, make, function, settings):
        tensors, mask = make(4)
        next(iter(tensors.values())).requires_grad_()
        result = function(**tensors, mask=mask, **settings)
        assert [item.requires_grad for item in result] == [True] + [False] * (len(result) - 1)

    def test_shapes_are_checked(self, make, function, settings):
        tensors, mask = make(5)
        with pytest.raises(ValueError, match=r"mask \[2, 6\]"):
            function(**tensors, mask=mask[:2], **settings)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased_by_enumeration(kind):
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = torch.log_softmax(torch.randn(2, 5, generator=generator, dtype=torch.float64), -1)
    expected = F.kl_div(ref_logps, logps, log_target=True, reduction="sum")
    torch.testing.assert_close((logps.exp() * kl_estimate(logps, ref_logps, kind)).sum(), expected)


def test_kl_estimates_by_value():
    logps, ref_logps = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(kl_estimate(logps, ref_logps, "k1"), torch.tensor([0.5, -1.0]))
    expected = torch.tensor([math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0])
    torch.testing.assert_close(kl_estimate(logps, ref_logps, "k3"), expected)
    with pytest.raises(ValueError, match="'k1' or 'k3', got 'k2'"):
        kl_estimate(logps, ref_logps, "k2")


def text_case(side):
    """Logits, ids and mask of three texts padded on one side, and the mean loss of the texts one by one."""
    generator = torch.Generator().manual_seed(0)
    lengths, total = [6, 1, 4], 6
    logits = torch.full((3, total, 9), float("nan"), dtype=torch.float64)
    ids, mask = torch.full((3, total), -100), torch.zeros(3, total)
    loss = 0.0
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(total - length, total)
        logits[row, place] = torch.randn(length, 9, generator=generator, dtype=torch.float64)
        ids[row, place] = torch.randint(0, 9, (length,), generator=generator)
        mask[row, place] = 1
        loss += F.cross_entropy(logits[row, place][:-1], ids[row, place][1:], reduction="sum")
    return logits, ids, mask, loss / 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_lm_loss_equals_cross_entropy(side):
    logits, ids, mask, expected = text_case(side)
    torch.testing.assert_close(lm_loss(logits, ids, mask), expected)
    torch.testing.assert_close(lm_loss(logits, ids, mask, denominator=3), expected * 8 / 3)
    assert predicted_mask(mask).sum() == 8
    assert not predicted_mask(mask)[:, 0].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_lm_loss_gradient_ignores_padding(side):
    logits, ids, mask, _ = text_case(side)
    logits.requires_grad_()
    lm_loss(logits, ids, mask).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[~mask.bool()].abs().max() == 0
    real = logits.detach()[mask.bool()].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda items: lm_loss(logits.detach().masked_scatter(mask.bool()[..., None], items), ids, mask), (real,)
    )


def test_lm_loss_micro_batches_add_up():
    logits, ids, mask, expected = text_case("right")
    count = predicted_mask(mask).sum()
    parts = [lm_loss(logits[rows], ids[rows], mask[rows], denominator=count) for rows in ([0, 1], [2])]
    torch.testing.assert_close(sum(parts), expected)


def test_nothing_to_predict_is_zero():
    assert lm_loss(torch.randn(1, 1, 4), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)) == 0
