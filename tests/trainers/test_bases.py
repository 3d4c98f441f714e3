"""The base of on-policy trainers says in code which hooks a subclass defines."""

import pytest

from instructgpt_hf._compat.trainers import OnPolicyTrainer
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

HOOKS = (
    "render_prompt",
    "in_batches",
    "continuous_batching",
    "episode_sampler",
    "rollout",
    "minibatches",
    "one_minibatch",
    "minibatch_loss",
    "gradient_done",
    "set_learning_rates",
    "save_models",
    "load_models",
    "load_state",
    "save_pretrained",
)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_trainer_without_a_hook_cannot_be_built(hook):
    rest = {name: getattr(PPOTrainer, name) for name in HOOKS if name != hook}
    incomplete = type("Incomplete", (OnPolicyTrainer,), rest)
    with pytest.raises(TypeError, match=rf"Can't instantiate abstract class Incomplete .*\b{hook}\b"):
        incomplete()


def test_ppo_defines_every_hook():
    assert OnPolicyTrainer.__abstractmethods__ == set(HOOKS)
    assert not PPOTrainer.__abstractmethods__
