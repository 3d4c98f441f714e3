"""Log-probabilities and entropy against log_softmax; gradients by finite differences; memory of the backward pass."""

import pytest
import torch
from torch.distributions import Categorical

from instructgpt_hf.functional import log_probs, log_probs_and_entropy, token_log_probs


def case(seed=0, dtype=torch.float64, shape=(3, 5, 11)):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, shape[-1], shape[:2], generator=generator)


def naive(logits, ids, temperature):
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)


@pytest.fixture(params=[1 << 24, 120, 30, 1], ids=["one block", "rows", "parts of rows", "single tokens"])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(log_probs, "_BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probs_equal_log_softmax(block_elements, temperature):
    logits, ids = case()
    logits.requires_grad_()
    weights = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = naive(logits, ids, temperature)
    actual = token_log_probs(logits, ids, temperature)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad((item * weights).sum(), logits)[0] for item in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_equals_the_distribution_s(block_elements, temperature):
    logits, ids = case(2)
    logps, entropy = log_probs_and_entropy(logits.requires_grad_(), ids, temperature)
    torch.testing.assert_close(entropy, Categorical(logits=logits.detach() / temperature).entropy())
    torch.testing.assert_close(logps, token_log_probs(logits, ids, temperature))
    assert logps.requires_grad and not entropy.requires_grad


def test_gradients_by_finite_differences(block_elements):
    logits, ids = case(3, shape=(2, 2, 5))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda item: token_log_probs(item, ids, 0.7), (logits,))
    assert torch.autograd.gradcheck(lambda item: log_probs_and_entropy(item, ids, 0.7)[0], (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, ids = case(4, dtype)
    logits.requires_grad_()
    actual, wide = token_log_probs(logits, ids, 0.7), logits.detach().float().requires_grad_()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, naive(wide, ids, 0.7))
    actual.sum().backward()
    naive(wide, ids, 0.7).sum().backward()
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype))
    logps, entropy = log_probs_and_entropy(logits, ids, 0.7)
    assert entropy.dtype == logps.dtype == torch.float32
    torch.testing.assert_close(entropy, Categorical(logits=logits.detach().float() / 0.7).entropy())


def test_logits_need_not_be_contiguous():
    logits, ids = case(5, shape=(3, 6, 11))
    torch.testing.assert_close(token_log_probs(logits[:, :-1], ids[:, 1:]), naive(logits[:, :-1], ids[:, 1:], 1.0))


def test_impossible_tokens_have_entropy_zero_and_log_probability_minus_infinity():
    logits = torch.tensor([[[0.0, 0.0, -float("inf")]]], requires_grad=True)
    torch.testing.assert_close(log_probs_and_entropy(logits, torch.tensor([[0]]))[1], torch.tensor([[2.0]]).log())
    assert token_log_probs(logits, torch.tensor([[2]])).item() == -float("inf")


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, -1e4, 9e3]]])
    assert token_log_probs(logits, torch.tensor([[0]])).item() == 0
    assert token_log_probs(logits, torch.tensor([[1]])).item() == -2e4
    assert log_probs_and_entropy(logits, torch.tensor([[1]]))[1].item() == 0


def test_a_token_without_gradient_gives_none_even_where_its_logits_are_broken():
    logits, ids = case(6)
    logits[0, 0] = float("nan")
    logits.requires_grad_()
    token_log_probs(logits, ids)[1:].sum().backward()
    assert logits.grad[0].abs().max() == 0
    assert torch.isfinite(logits.grad).all()


def test_backward_keeps_the_logits_and_nothing_else_of_their_size():
    logits, ids = case(7, torch.bfloat16, (2, 4, 50))
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda item: kept.append(item) or item, lambda item: item):
        token_log_probs(logits, ids, 0.7)
    large = [item for item in kept if item.numel() >= logits.numel()]
    assert [item.data_ptr() for item in large] == [logits.data_ptr()]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 4\] and \[2, 3, 5\]"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), 0.0)
    with pytest.raises(ValueError, match=r"logits \[B, T, V\], got \[3, 5\]"):
        log_probs_and_entropy(torch.zeros(3, 5), torch.zeros(3, 5))
