"""The paper's residual dropout: set where an architecture has it, alone, and restored for the saved model."""

import pytest
import torch

from instructgpt_hf.trainers.sft import RESIDUAL_DROPOUT, restore_config, set_residual_dropout


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_set_and_restored(make_policy, architecture):
    changes = {"gpt2": {"attn_pdrop": 0.3}, "gpt_neox": {"attention_dropout": 0.3}}[architecture]
    config, untouched = (make_policy(architecture, **changes).config for _ in range(2))
    before = set_residual_dropout(config, 0.2)
    name, others = RESIDUAL_DROPOUT[architecture]
    assert getattr(config, name) == 0.2 and all(getattr(config, other) == 0.0 for other in others)
    restore_config(config, before)
    assert config.to_dict() == untouched.to_dict()


def test_architecture_without_it_is_left_alone(make_policy):
    config = make_policy("llama").config
    before = config.to_dict()
    assert set_residual_dropout(config, 0.2) is None
    assert config.to_dict() == before


@pytest.mark.parametrize("architecture", sorted(RESIDUAL_DROPOUT))
def test_name_exists_in_transformers(architecture):
    """A name that transformers no longer has would set nothing."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(architecture)
    set_residual_dropout(config, 0.2)
    rates = {key: value for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)}
    name, _ = RESIDUAL_DROPOUT[architecture]
    assert rates.pop(name) == 0.2
    # Those of classification heads and of whole layers are not part of a causal language model's forward pass.
    rest = {key: value for key, value in rates.items() if "classifier" not in key and "summary" not in key}
    assert all(value in (0, 0.0) for value in rest.values()), rest


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_acts_in_training_only(make_policy, architecture):
    from transformers import AutoModelForCausalLM

    config = make_policy(architecture).config
    set_residual_dropout(config, 0.5)
    model = AutoModelForCausalLM.from_config(config)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert 0.5 in rates and rates <= {0.0, 0.5}
    ids = torch.arange(3, 20)[None]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
