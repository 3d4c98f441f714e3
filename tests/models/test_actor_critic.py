"""Log-probabilities, entropies and values of completions against plain forward passes over single sequences."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from transformers.modeling_outputs import CausalLMOutput

from instructgpt_hf.models.actor_critic import ActorCritic, ActorCriticOutput

ROWS = [([5, 6, 7], [8, 9, 1]), ([10], [11, 12, 13, 14, 1]), ([15, 16], [17, 1]), ([3, 4, 5, 6], [1])]


def layout(rows):
    """Prompts padded left, completions padded right; ids, mask and completion length."""
    before, after = max(len(prompt) for prompt, _ in rows), max(len(answer) for _, answer in rows)
    ids, mask = [], []
    for prompt, answer in rows:
        left, right = before - len(prompt), after - len(answer)
        ids.append([0] * left + prompt + answer + [0] * right)
        mask.append([0] * left + [1] * len(prompt + answer) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), after


def log_probs(policy, temperature=1.0, rows=ROWS, **options):
    return ActorCritic(policy, torch.nn.Module(), temperature).log_probs(policy, *layout(rows), **options)


def plain_log_probs(policy, prompt, answer, temperature=1.0):
    """[answer, V] log-softmax before each answer token, from one unpadded forward pass."""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + answer])).logits[0].float() / temperature
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy(make_policy, architecture, temperature):
    policy = make_policy(architecture).eval()
    logps, entropy = log_probs(policy, temperature, with_entropy=True)
    assert logps.shape == entropy.shape == (4, 5) and logps.requires_grad and not entropy.requires_grad
    for row, (prompt, answer) in enumerate(ROWS):
        expected = plain_log_probs(policy, prompt, answer, temperature)
        real = slice(0, len(answer))
        chosen = expected[torch.arange(len(answer)), torch.tensor(answer)]
        torch.testing.assert_close(logps[row, real].detach(), chosen)
        torch.testing.assert_close(entropy[row, real], -(expected.exp() * expected).sum(-1))


def test_architecture_that_unembeds_without_its_module(make_policy):
    """A model whose forward pass does not call its unembedding agrees with one that does."""

    class Direct(type(make_policy())):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
            hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
            return CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    policy = make_policy().eval()
    other = Direct(policy.config).eval()
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(log_probs(other)[0], log_probs(policy)[0])


def test_nothing_is_computed_for_padding(make_policy):
    """11 completion tokens are unembedded, in rows as long as the longest prompt and completion together."""
    policy = make_policy().eval()
    seen = []
    policy.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    policy.model.embed_tokens.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    _, mask, length = layout(ROWS)
    logps, entropy = log_probs(policy, with_entropy=True)
    assert seen == [(4, 6, 32), (1, 11, 64)], "3 + 5 + 2 + 1 tokens, 1 + 5 in the longest row"
    padding = mask[:, -length:] == 0
    assert logps[padding].eq(0).all() and entropy[padding].eq(0).all()
    assert not policy.lm_head._forward_pre_hooks, "the hook is left in the model"


def test_gradient_is_that_of_the_plain_pass(make_policy):
    first, second = make_policy().eval(), make_policy().eval()
    logps, _ = log_probs(first, rows=ROWS[:2])
    (logps[0, :3].sum() + logps[1].sum()).backward()
    total = 0.0
    for prompt, answer in ROWS[:2]:
        logits = second(torch.tensor([prompt + answer])).logits[0]
        chosen = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        total = total + chosen[torch.arange(len(answer)), torch.tensor(answer)].sum()
    total.backward()
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


class TestActorCritic:
    @pytest.fixture
    def pair(self, make_policy, make_scorer):
        return ActorCritic(make_policy().eval(), make_scorer().eval(), temperature=0.8)

    def test_values_stand_before_their_token(self, pair):
        """The value of token t is the scorer's output on everything before t."""
        pair.value_model.config.reward_shift = 0.5
        ids, mask, length = layout(ROWS)
        with torch.no_grad():
            output = pair(ids, mask, length)
        assert isinstance(output, ActorCriticOutput) and output.entropy is None
        for row, (prompt, answer) in enumerate(ROWS):
            for index in range(len(answer)):
                before = torch.tensor([prompt + answer[:index]])
                with torch.no_grad():
                    expected = pair.value_model(input_ids=before).logits[0, 0] - 0.5
                torch.testing.assert_close(output.values[row, index], expected)

    def test_temperature_divides_the_logits(self, pair):
        ids, mask, length = layout(ROWS)
        with torch.no_grad():
            output = pair(ids, mask, length, with_entropy=True)
        prompt, answer = ROWS[1]
        expected = plain_log_probs(pair.policy, prompt, answer, 0.8)[torch.arange(5), torch.tensor(answer)]
        torch.testing.assert_close(output.logps[1], expected)
        assert output.entropy is not None

    def test_summed_loss_of_whole_texts(self, pair):
        """The policy's own, at temperature 1 whatever the rollouts' is."""
        ids = torch.arange(3, 11)[None]
        with torch.no_grad():
            output = pair(ids, torch.ones_like(ids))
            torch.testing.assert_close(output.lm_loss, 7 * pair.policy(ids, labels=ids).loss)
        assert output.lm_loss.shape == () and output == ActorCriticOutput(lm_loss=output.lm_loss)

    def test_autocast_of_accelerate_keeps_the_kind_of_output(self, pair):
        """Tensors are widened to float32, and what was not asked stays None."""
        ids, mask, length = layout(ROWS)
        with torch.no_grad():
            expected = pair(ids, mask, length), pair(ids, mask)
            half = pair.to(torch.bfloat16)
            # What `Accelerator.prepare_model` puts around a forward pass in mixed precision.
            forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(half.forward))
            output, text = forward(ids, mask, length), forward(ids, mask)
        assert isinstance(output, ActorCriticOutput) and isinstance(text, ActorCriticOutput)
        for found, plain in ((output, expected[0]), (text, expected[1])):
            assert [item is None for item in found] == [item is None for item in plain]
            assert {item.dtype for item in found if item is not None} == {torch.float32}

    @pytest.mark.parametrize("role", ["policy", "value_model", None], ids=["policy", "value", "whole texts"])
    def test_a_pass_of_one_role_can_give_the_other_a_gradient_of_zero(self, pair, role):
        ids, mask, length = layout(ROWS)
        gradients = []
        for complete in (False, True):
            pair.zero_grad()
            if role is None:
                pair(ids, mask, complete=complete).lm_loss.backward()
            else:
                output = pair(ids, mask, length, role=role, complete=complete)
                (output.values if role == "value_model" else output.logps).sum().backward()
            gradients.append({name: item.grad for name, item in pair.named_parameters()})
        own = pair.role_parameters(role or "policy")
        for name, gradient in gradients[1].items():
            if name in own:
                assert gradient.any() and torch.equal(gradient, gradients[0][name])
            else:
                assert gradients[0][name] is None and not gradient.any()

    def test_policy_and_value_share_no_weight(self, pair):
        policy = {item.data_ptr() for item in pair.policy.parameters()}
        assert not policy & {item.data_ptr() for item in pair.value_model.parameters()}
        assert len(list(pair.parameters())) == sum(
            len(list(model.parameters())) for model in (pair.policy, pair.value_model)
        )

    def test_answers_for_the_policy(self, pair):
        assert pair.config is pair.policy.config and pair.generation_config is pair.policy.generation_config
        with pytest.raises(AttributeError):
            _ = pair.no_such_attribute
