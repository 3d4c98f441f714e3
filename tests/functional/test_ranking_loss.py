"""Equation 1 against a double loop over pairs, against numbers worked out by hand, and its gradient."""

import math

import pytest
import torch

from instructgpt_hf.functional import all_pairs_loss, pair_counts, strict_pairs


def case(seed, prompts=5):
    """Completions of several prompts in mixed order: scores, ranks with ties, groups with gaps between the ids."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.full((2 + seed % 3 + prompt,), 7 * prompt + 2) for prompt in range(prompts)])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    ranks = torch.randint(1, 5, groups.shape, generator=generator)
    scores = 2 * torch.randn(groups.shape, generator=generator, dtype=torch.float64)
    return scores, ranks, groups


def loop(scores, ranks, groups):
    """Loss and pairs by prompt, written as the definition reads."""
    losses, counts = [], []
    for group in sorted(set(groups.tolist())):
        members = [i for i, name in enumerate(groups.tolist()) if name == group]
        terms = []
        for i in members:
            for j in members:
                if ranks[i] < ranks[j]:
                    gap = (scores[i] - scores[j]).item()
                    terms.append(math.log1p(math.exp(-gap)))
        losses.append(sum(terms) / len(terms) if terms else 0.0)
        counts.append(len(terms))
    return losses, counts


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_double_loop(seed):
    scores, ranks, groups = case(seed)
    losses, counts = loop(scores, ranks, groups)
    torch.testing.assert_close(all_pairs_loss(scores, ranks, groups).tolist(), losses)
    assert pair_counts(ranks, groups).tolist() == counts
    assert strict_pairs(ranks, groups).sum() == sum(counts)


def test_three_completions_with_a_tie_by_hand():
    # Pairs (first, second) and (first, third); the tied second and third are no pair.
    loss = all_pairs_loss(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1, 2, 2]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(loss, torch.tensor([(0.3132616875 + 0.1269280110) / 2]))
    assert strict_pairs(torch.tensor([1, 2, 2]), torch.zeros(3)).tolist() == [
        [False, True, True],
        [False, False, False],
        [False, False, False],
    ]


def test_prompt_with_ties_only_gives_zero_and_no_gradient():
    scores = torch.tensor([1.0, 2.0, 0.3, 0.7], requires_grad=True)
    ranks, groups = torch.tensor([1, 1, 1, 2]), torch.tensor([4, 4, 1, 1])
    loss = all_pairs_loss(scores, ranks, groups)
    assert pair_counts(ranks, groups).tolist() == [1, 0]
    assert loss[1] == 0
    loss.sum().backward()
    assert scores.grad[:2].tolist() == [0, 0]
    assert (scores.grad[2:] != 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_gradient_by_finite_differences(seed):
    scores, ranks, groups = case(seed)
    assert torch.autograd.gradcheck(lambda item: all_pairs_loss(item, ranks, groups), (scores.requires_grad_(),))


def test_adding_a_constant_to_one_prompt_changes_nothing():
    scores, ranks, groups = case(1)
    shifted = scores + 5.0 * (groups == groups[0])
    torch.testing.assert_close(all_pairs_loss(shifted, ranks, groups), all_pairs_loss(scores, ranks, groups))


def test_large_differences_stay_finite_in_half_precision():
    scores = torch.tensor([-300.0, 300.0], dtype=torch.bfloat16, requires_grad=True)
    loss = all_pairs_loss(scores, torch.tensor([1, 2]), torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 600
    assert scores.grad.tolist() == [-1, 1]


def test_a_broken_score_stays_in_its_prompt():
    scores = torch.tensor([float("nan"), 1.0, 2.0, 1.0], requires_grad=True)
    loss = all_pairs_loss(scores, torch.tensor([1, 2, 1, 2]), torch.tensor([0, 0, 1, 1]))
    loss[1].backward()
    assert math.isfinite(loss[1].item())
    assert torch.isfinite(scores.grad[2:]).all()


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_shapes_are_checked(shape):
    with pytest.raises(ValueError, match="vectors of one length, got scores"):
        all_pairs_loss(torch.zeros(shape), torch.ones(4), torch.zeros(4))
