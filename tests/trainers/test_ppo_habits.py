"""The PPO trainer as people who know TRL's RLOO and GRPO trainers write it: names, objects or functions as rewards."""

import logging
import math

import pytest
import torch
import trl
from datasets import Dataset
from helpers.ppo_trainer import SETTINGS, snapshot
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from instructgpt_hf import InstructGPTError, PPOConfig, PPOTrainer, load_reward_model
from instructgpt_hf.lab import base_model_path
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model
from instructgpt_hf.models.scoring import TextRewardModel, token_scores
from instructgpt_hf.models.value_model import value_model_of
from instructgpt_hf.trainers.ppo.rewards import RewardModelFunction

QUICK = SETTINGS | dict(
    generation_batch_size=8, total_episodes=8, warmup_iterations=0, use_cpu=True, bf16=False, ema_decay=0.0
)
PROMPTS = Dataset.from_dict({"prompt": [f"Where is the fox {index}?" for index in range(8)], "answer": ["a"] * 8})
LORA = LoraConfig(r=4, target_modules="all-linear")


def short(completions, answer, **_):
    return [-len(text) / 10 for text in completions]


def ppo(folder, rewards=None, settings=(), data=PROMPTS, model="lab", **more):
    args = PPOConfig(str(folder), **{**QUICK, **dict(settings)})
    return PPOTrainer(model, rewards, args, train_dataset=data, **more)


def reward_folder(folder, adapter):
    """A reward model on the lab's base, as RewardTrainer.save_model writes it, with a head that is not tiny."""
    tokenizer = load_tokenizer(base_model_path())
    model = create_reward_model(base_model_path(), tokenizer, seed=1, peft_config=LORA if adapter else None)
    save_reward_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["whole", "adapter"])
def reward(request, tmp_path_factory):
    return reward_folder(tmp_path_factory.mktemp("reward"), request.param == "adapter")


def moved(before, module):
    return {
        name for name, item in module.named_parameters() if item.requires_grad and not torch.equal(item, before[name])
    }


def scores_of(model, ids):
    with torch.no_grad():
        return token_scores(model, ids, torch.ones_like(ids))


IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("by_name", [True, False], ids=["name", "object"])
def test_value_model_is_a_trained_copy_of_the_reward_model(tmp_path, reward, peft_config, by_name):
    given = str(reward) if by_name else load_reward_model(reward)
    trainer = ppo(tmp_path, given, peft_config=peft_config)
    value, function = trainer.actor_critic.value_model, trainer.reward_funcs[0]
    expected = scores_of(load_reward_model(reward), IDS)
    torch.testing.assert_close(scores_of(value, IDS), expected)
    before = snapshot(trainer.actor_critic)
    trainer.train()
    changed = moved(before, trainer.actor_critic)
    assert any(name.startswith("value_model.") for name in changed)
    assert any(name.startswith("policy.") for name in changed)
    assert any("score" in name for name in changed)
    assert not torch.equal(scores_of(value, IDS), expected)
    torch.testing.assert_close(scores_of(function.model, IDS), expected)  # the reward model is frozen
    if peft_config is not None:
        assert not [name for name in changed if "lora_" not in name and "score" not in name]
    trainer.save_model(tmp_path / "model")
    torch.testing.assert_close(
        scores_of(load_reward_model(tmp_path / "model" / "value_model"), IDS), scores_of(value, IDS)
    )
    kind = AutoModelForCausalLM if peft_config is None else AutoPeftModelForCausalLM
    kind.from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == trainer.processing_class.eos_token


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all", "lora"])
def test_function_alone_makes_the_value_model_from_the_policy(tmp_path, peft_config, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = ppo(tmp_path, short, peft_config=peft_config)
    assert "value_warmup_iterations" in caplog.text
    value, before = trainer.actor_critic.value_model, snapshot(trainer.actor_critic)
    hidden = AutoModelForCausalLM.from_pretrained(base_model_path()).model(IDS).last_hidden_state
    torch.testing.assert_close(scores_of(value, IDS), (hidden @ value.score.weight.T).squeeze(-1).detach())
    assert value.score.weight.detach().std().item() == pytest.approx(1 / math.sqrt(hidden.shape[-1] + 1), rel=0.3)
    trainer.train()
    changed = moved(before, trainer.actor_critic)
    assert {name.split(".")[0] for name in changed} == {"policy", "value_model"}
    trainer.save_model(tmp_path / "model")
    saved = load_reward_model(tmp_path / "model" / "value_model")
    torch.testing.assert_close(scores_of(saved, IDS), scores_of(value, IDS))


def test_warm_up_that_is_set_needs_no_advice(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ppo(tmp_path, short, settings={"value_warmup_iterations": 1, "total_episodes": 16})
    assert "value_warmup_iterations" not in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "qwen2"])
def test_value_model_of_a_policy_of_any_architecture(make_policy, tokenizer, architecture):
    try:
        policy = make_policy(architecture).eval()
    except KeyError:
        pytest.skip("no tiny config of it")
    try:
        value = value_model_of(policy, tokenizer, seed=0).eval()
    except InstructGPTError as error:
        assert "head" in str(error)
        return
    inner = getattr(policy, policy.base_model_prefix)
    expected = inner(IDS).last_hidden_state @ value.score.weight.T
    torch.testing.assert_close(scores_of(value, IDS), expected.squeeze(-1).detach())
    assert value.config.architectures == [type(value).__name__] and value.config.num_labels == 1


def test_several_rewards_with_weights(tmp_path, reward):
    trainer = ppo(tmp_path, [str(reward), short], {"reward_weights": [1.0, 0.5]})
    trainer.train()
    record = trainer.state.log_history[0]
    weighted = record["rewards/reward_model"] + 0.5 * record["rewards/short"]
    assert record["objective/scores"] == pytest.approx(weighted, abs=1e-4)


def test_reward_model_is_another_name_of_reward_funcs(tmp_path):
    assert ppo(tmp_path, reward_model=short).reward_func_names == ["short"]
    with pytest.raises(InstructGPTError, match=r"reward_funcs: .*only one of the two"):
        ppo(tmp_path, short, reward_model=short)
    with pytest.raises(InstructGPTError, match="reward_funcs: pass a reward model"):
        ppo(tmp_path)
    with pytest.raises(InstructGPTError, match="reward_funcs: the list is empty"):
        ppo(tmp_path, [])
    with pytest.raises(InstructGPTError, match="reward_funcs: found a int"):
        ppo(tmp_path, [3])


def test_reward_model_of_another_tokenizer_reads_text(tmp_path, make_scorer, tokenizer):
    """By its name, in memory, or with its tokenizer; the value model is then the policy's."""
    folder = tmp_path / "other"
    make_scorer().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for given, own in (
        (str(folder), None),
        (load_reward_model(folder), None),
        (make_scorer(), tokenizer),
        (TextRewardModel(make_scorer(), tokenizer, ppo_format(tokenizer)), None),
    ):
        trainer = ppo(tmp_path / "run", given, reward_processing_classes=own)
        function = trainer.reward_funcs[0]
        assert isinstance(function, RewardModelFunction) and function.reader.model.tokenizer.vocab_size == 64
        assert trainer.actor_critic.value_model.config.vocab_size == trainer.actor_critic.policy.config.vocab_size
    trainer.train()


def ppo_format(tokenizer):
    from instructgpt_hf import PromptFormat

    return PromptFormat.create("raw", tokenizer)


def test_value_model_by_name(tmp_path, reward, make_scorer, tokenizer):
    trainer = ppo(tmp_path, short, value_model=str(reward))
    torch.testing.assert_close(
        scores_of(trainer.actor_critic.value_model, IDS), scores_of(load_reward_model(reward), IDS)
    )
    make_scorer().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InstructGPTError, match=r"value_model: .*another tokenizer than the policy"):
        ppo(tmp_path, short, value_model=str(tmp_path / "other"))
    model = load_reward_model(reward)
    with pytest.raises(InstructGPTError, match="value_model: is the reward model itself"):
        ppo(tmp_path, model, value_model=model)


def test_conversations_and_the_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    seen = []

    def count(prompts, completions, **_):
        seen.append((prompts[0], completions[0]))
        return [1.0] * len(prompts)

    turns = [{"role": "user", "content": "Where is the fox?"}]
    trainer = ppo(tmp_path, count, data=Dataset.from_list([{"prompt": turns}] * 8), processing_class=tokenizer)
    assert tokenizer.decode(trainer.render_prompt(turns)) == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    trainer.train()
    assert seen[0][0] == turns and seen[0][1][0]["role"] == "assistant"


def test_evaluation_callbacks_and_settings_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer = ppo(
        tmp_path, short, eval_dataset={"first": PROMPTS, "second": PROMPTS.select(range(4))}, callbacks=[Watch()]
    )
    trainer.train()
    assert steps == [1]
    assert {"eval_first_loss", "eval_second_loss"} <= trainer.evaluate().keys()
    # Without settings and text: plain PPO with the paper's batch, which this dataset is too small for.
    with pytest.raises(InstructGPTError, match="train_dataset has 8 prompts, fewer than generation_batch_size=512"):
        PPOTrainer("lab", short, train_dataset=PROMPTS)


def test_what_cannot_be_used_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(InstructGPTError, match=r"train_dataset: missing column 'prompt'.*'wording'"):
        ppo(tmp_path, short, data=Dataset.from_dict({"wording": ["a"] * 8}))
    with pytest.raises(InstructGPTError, match=r"eval_dataset\['held'\]: missing column 'prompt'"):
        ppo(tmp_path, short, eval_dataset={"held": Dataset.from_dict({"wording": ["a"]})})
    with pytest.raises(InstructGPTError, match="compute_metrics: PPO has no predictions"):
        ppo(tmp_path, short, compute_metrics=len)
    with pytest.raises(InstructGPTError, match=r"args: is a trl RLOOConfig.*instructgpt_hf.PPOConfig"):
        PPOTrainer("lab", short, trl.RLOOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=PROMPTS)
    with pytest.raises(InstructGPTError, match="prompts cannot be streamed"):
        ppo(tmp_path, short, data=PROMPTS.to_iterable_dataset())


def test_long_prompts_are_left_out(tmp_path, caplog):
    data = Dataset.from_dict({"prompt": [*PROMPTS["prompt"], "Where is the fox? " * 30], "answer": ["a"] * 9})
    with caplog.at_level(logging.WARNING):
        trainer = ppo(tmp_path, short, {"max_prompt_length": 40}, data=data)
    assert len(trainer.train_dataset) == 8 and "left out 1 prompts over max_prompt_length" in caplog.text
