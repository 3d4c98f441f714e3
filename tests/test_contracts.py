"""The private names and signatures of TRL and transformers that `instructgpt_hf._compat` relies on.

A failure here means: read the upstream diff of the named method, adapt `_compat` and the trainers, then move the
version bound in pyproject.toml. The behaviour of the libraries is tested in tests/compat.
"""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer
from trl import RewardTrainer, RLOOTrainer, SFTTrainer

from instructgpt_hf._compat import contracts, peft


@pytest.mark.parametrize("name", sorted(contracts.CONTRACTS))
def test_signature(name):
    owner, expected = contracts.CONTRACTS[name]
    function = getattr(owner, name.split(".")[1]) if "." in name else owner
    assert tuple(inspect.signature(function).parameters) == expected, (
        f"{name} has changed; read its diff upstream, adapt instructgpt_hf/_compat, then move the bound."
    )


@pytest.mark.parametrize("name", contracts.RLOO_ATTRIBUTES)
def test_attribute_is_set_by_the_constructor(name):
    source = inspect.getsource(RLOOTrainer.__init__)
    assert f"self.{name}" in source, f"RLOOTrainer no longer sets {name}; see instructgpt_hf/_compat."


@pytest.mark.parametrize("name", contracts.SUPERVISED_ATTRIBUTES)
@pytest.mark.parametrize("trainer", [SFTTrainer, RewardTrainer])
def test_supervised_attribute_is_set_by_the_constructor(trainer, name):
    assert f"self.{name} = " in inspect.getsource(trainer.__init__), f"see {name} in instructgpt_hf/_compat"


@pytest.mark.parametrize("name", contracts.LOOP_ATTRIBUTES)
def test_attribute_is_set_before_training_begins(name):
    source = inspect.getsource(Trainer._inner_training_loop)
    assert f"self.{name} = " in source.split("on_train_begin")[0], f"see {name} in instructgpt_hf/_compat"


def test_the_reference_adapter_has_its_name():
    source = inspect.getsource(RLOOTrainer.__init__)
    assert f'add_adapter("{peft.REFERENCE_ADAPTER}"' in source


def test_hooks_are_called_by_the_methods_that_stay_with_trl():
    """An override that upstream no longer calls would silently train with TRL's algorithm."""
    assert "inputs = self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "inputs = self._prepare_inputs(inputs)" in inspect.getsource(RLOOTrainer.prediction_step)
    assert "self._compute_loss(" in inspect.getsource(RLOOTrainer.compute_loss)
    assert "self._tokenize_prompts(" in inspect.getsource(RLOOTrainer._generate)
    assert "self._step += 1" in inspect.getsource(RLOOTrainer.training_step)
    for name in ("_get_output_dir", "_push_from_checkpoint"):
        assert f"self.{name}(" in inspect.getsource(Trainer._save_checkpoint)
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)
