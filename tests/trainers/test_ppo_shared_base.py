"""PPO with four roles on one base takes the steps of PPO with four separate models, and resumes."""

import pytest
import torch
from datasets import Dataset
from helpers.ppo_trainer import build_trainer, count_c
from peft import LoraConfig, get_peft_model

from instructgpt_hf.models.adapters import REWARD_ADAPTER, VALUE_ADAPTER
from instructgpt_hf.models.loading import load_policy
from instructgpt_hf.models.reward_model import create_reward_model, load_reward_model, save_reward_model
from instructgpt_hf.models.scoring import token_scores
from instructgpt_hf.models.shared_base import load_scorers
from instructgpt_hf.trainers.ppo.reference import reference_log_probs

PROMPTS = Dataset.from_dict({"prompt": [f"a b w{index % 35}" for index in range(32)]})


@pytest.fixture
def folders(make_policy, tokenizer, tmp_path):
    base = tmp_path / "base"
    make_policy().save_pretrained(base)
    tokenizer.save_pretrained(base)
    policy = load_policy(base, tokenizer, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    for name, item in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(item, std=0.1)
    policy.save_pretrained(tmp_path / "sft")
    save_reward_model(create_reward_model(tmp_path / "sft", tokenizer, seed=0), tmp_path / "reward")
    return tmp_path / "sft", tmp_path / "reward"


@pytest.fixture
def make_trainer(folders, tokenizer, tmp_path):
    def build(shared, name, **changes):
        sft, reward_folder = folders
        policy = load_policy(str(sft), tokenizer)
        if shared:
            reward, value = load_scorers(policy, str(reward_folder))
            assert reward.host is policy
        else:
            reward, value = load_reward_model(reward_folder), load_reward_model(reward_folder, trainable=True)
        settings = dict(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            total_episodes=64,
            learning_rate=1e-2,
            value_learning_rate=1e-2,
            ptx_coef=1.0,
            ema_decay=0.9,
            use_cpu=True,
        )
        return build_trainer(policy, reward, value, tokenizer, tmp_path / name, PROMPTS, **{**settings, **changes})

    return build


METRICS = ("objective/scores", "objective/kl", "loss/policy", "loss/value", "loss/ptx", "val/explained_variance")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_shared_base_trains_as_separate_models_do(make_trainer, checkpointing):
    one = make_trainer(True, "one", gradient_checkpointing=checkpointing)
    frozen = {
        name: item.detach().clone() for name, item in one.actor_critic.named_parameters() if not item.requires_grad
    }
    start = {name: item.detach().clone() for name, item in one.actor_critic.named_parameters() if item.requires_grad}
    assert any(REWARD_ADAPTER in name for name in frozen) and any(".ref." in name for name in frozen)
    assert any(VALUE_ADAPTER in name for name in start) and any(".default." in name for name in start)
    one.train()
    four = make_trainer(False, "four")
    four.train()
    for record, other in zip(one.state.log_history[:-1], four.state.log_history[:-1], strict=True):
        assert {key: record[key] for key in METRICS} == pytest.approx(
            {key: other[key] for key in METRICS}, rel=1e-3, abs=1e-4
        )
    for name, item in one.actor_critic.named_parameters():
        if name in frozen:
            assert torch.equal(item, frozen[name]), name
        else:
            assert not torch.equal(item, start[name]), name
            if ".default." in name:
                twin = four.actor_critic.get_parameter(name)
                torch.testing.assert_close(item, twin, rtol=1e-3, atol=1e-4)
    assert set(one.average.averages) == set(four.average.averages), "the average is the policy's alone"


def test_shared_base_resumes_bit_for_bit_and_saves_its_models(make_trainer, tmp_path):
    common = dict(save_strategy="steps", save_steps=4, save_total_limit=None)
    whole = make_trainer(True, "whole", **common)
    whole.train()
    resumed = make_trainer(True, "resumed", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, item in resumed.actor_critic.named_parameters():
        assert torch.equal(item, whole.actor_critic.get_parameter(name)), name
    whole.save_pretrained(tmp_path / "stage")
    stored = load_reward_model(tmp_path / "stage" / "value_model")
    ids, mask = torch.tensor([[3, 4, 5, 1]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = token_scores(whole.actor_critic.value_model, ids, mask)
        torch.testing.assert_close(token_scores(stored, ids, mask), expected)
    saved = {path.name for path in (tmp_path / "stage").iterdir()}
    assert {"adapter_model.safetensors", "value_model"} <= saved and not {REWARD_ADAPTER, "ref"} & saved


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_the_reference_keeps_whole_modules_that_the_adapter_trains(
    tokenizer, make_policy, make_scorer, tmp_path, modules
):
    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], modules_to_save=modules)
    policy = get_peft_model(make_policy(), adapter)
    trainer = build_trainer(policy, count_c, make_scorer(), tokenizer, tmp_path, total_episodes=64, learning_rate=1e-2)
    ids = torch.tensor([[3, 4, 5, 6, 7, 1]])

    def log_probs():
        with torch.no_grad():
            reference = reference_log_probs(trainer.actor_critic, trainer.ref_model, ids, torch.ones_like(ids), 4)
            return reference, trainer.actor_critic.log_probs(policy, ids, torch.ones_like(ids), 4)[0]

    reference, start = log_probs()
    torch.testing.assert_close(reference, start)
    trainer.train()
    after, moved = log_probs()
    assert (moved - start).abs().max() > 0.1, "the modules must be trained for this test to say anything"
    torch.testing.assert_close(after, reference)
