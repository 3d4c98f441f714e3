"""A function that builds tiny PPO trainers."""

import pytest


@pytest.fixture
def make_trainer(tokenizer, make_policy, make_scorer, tmp_path):
    from ppo_trainer import build_trainer, count_c

    def build(reward=count_c, policy=None, value_model=None, tokenizer=tokenizer, **changes):
        return build_trainer(
            policy if policy is not None else make_policy(),
            reward,
            value_model if value_model is not None else make_scorer(),
            tokenizer,
            **{"output_dir": tmp_path / "work", **changes},
        )

    return build
