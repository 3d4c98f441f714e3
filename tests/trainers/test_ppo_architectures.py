"""PPO-ptx on every architecture, whole, with LoRA, and with LoRA on 4-bit weights: two iterations."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers.ppo_trainer import PROMPTS, build_trainer, snapshot
from helpers.tiny_models import tiny_config
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from instructgpt_hf.models.loading import load_policy
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.scoring import sequence_scores
from instructgpt_hf.models.shared_base import load_scorers

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt"]
KINDS = ["full", "lora", "nf4"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
EPISODES = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Folders with a random policy and a random reward model of an architecture."""
    made = {}

    def make(architecture):
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            policy = AutoModelForCausalLM.from_config(tiny_config(architecture))
            scorer = AutoModelForSequenceClassification.from_config(tiny_config(architecture, num_labels=1))
            for name, model in (("policy", policy), ("reward", scorer)):
                _spread(model)
                model.save_pretrained(root / name)
                tokenizer.save_pretrained(root / name)
            made[architecture] = root
        return made[architecture]

    return make


def _spread(model):
    """Random weights of several times the usual size: with the usual one, every prompt has the same completions."""
    with torch.no_grad():
        for item in model.parameters():
            if item.dim() > 1:
                item.mul_(4)


def adapter(task):
    return LoraConfig(task_type=task, r=4, target_modules="all-linear")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def trainer(request, kind, folders, tokenizer, tmp_path):
    root, options = folders(request.param), {"quantization_config": NF4} if kind == "nf4" else {}
    lora = kind != "full"
    policy = load_policy(root / "policy", tokenizer, peft_config=adapter("CAUSAL_LM") if lora else None, **options)
    value_adapter = adapter("SEQ_CLS") if lora else None
    reward_model, value_model = load_scorers(policy, root / "reward", peft_config=value_adapter, **options)
    return build_trainer(
        policy,
        reward_model,
        value_model,
        tokenizer,
        tmp_path,
        generation_batch_size=EPISODES,
        per_device_train_batch_size=EPISODES,
        per_device_eval_batch_size=3,
        total_episodes=2 * EPISODES,
        ptx_coef=1.0,
        adam_epsilon=1e-12,
        ema_decay=0.9,
        bf16=False,
    )


def alone(policy, prompt, completion):
    """Log-probabilities of a completion from one pass without padding, by the model's plain forward."""
    logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def check_rollout(trainer):
    """Log-probabilities and values of padded micro-batches are those of rows alone."""
    trainer.model.train()
    batch = trainer.rollout([PROMPTS[row] for row in range(EPISODES)])
    actor_critic = trainer.actor_critic
    lengths = set()
    for row in range(EPISODES):
        prompt, completion = (
            ids[row][mask[row].bool()].tolist() for ids, mask in (batch.tokens[:2], batch.tokens[2:])
        )
        lengths.add(len(prompt))
        count = len(completion)
        torch.testing.assert_close(
            batch.logps[row, :count], alone(actor_critic.policy, prompt, completion), rtol=1e-4, atol=1e-4
        )
        ids = torch.tensor([prompt + completion])
        values = actor_critic.values(ids, torch.ones_like(ids), count)[0]
        torch.testing.assert_close(batch.values[row, :count], values, rtol=1e-4, atol=1e-4)
    assert len(lengths) > 1, "some prompts are padded"
    ids, mask, length = batch.tokens.joined()
    ratios = (actor_critic(ids, mask, length).logps - batch.logps).exp()[batch.tokens.completion_mask.bool()]
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_saved_models(trainer, folder, options):
    """Policy and value model of the folder are those that were trained."""
    trainer.save_pretrained(folder)
    ids = torch.tensor([[3, 4, 38, 5, 6, 1]])
    actor_critic = trainer.actor_critic.eval()
    expected = actor_critic.values(torch.cat([ids, ids[:, :1]], 1), torch.ones(1, 7, dtype=torch.long), 1)[0, 0]
    value_model = load_reward_model(folder / "value_model", **options)
    torch.testing.assert_close(sequence_scores(value_model, ids, torch.ones_like(ids))[0], expected)
    policy = load_policy(folder, trainer.tokenizer, trainable=False, **options).eval()
    torch.testing.assert_close(policy(ids).logits, actor_critic.policy(ids).logits)


def test_two_iterations(trainer, kind, tmp_path):
    quantised = [item for item in trainer.actor_critic.modules() if isinstance(item, Linear4bit)]
    assert bool(quantised) == (kind == "nf4")
    check_rollout(trainer)
    trainer._metrics["train"].clear()
    reward_model = trainer.reward_funcs[0].model
    trained = {name for name, item in trainer.actor_critic.named_parameters() if item.requires_grad}
    before, reward_before = snapshot(trainer.actor_critic), snapshot(reward_model)
    reference = snapshot(trainer.ref_model) if trainer.ref_model is not None else {}
    trainer.train()
    moved = {name for name, item in trainer.actor_critic.named_parameters() if not torch.equal(item, before[name])}
    assert moved == trained, sorted(moved ^ trained)
    assert {name.split(".")[0] for name in trained} == {"policy", "value_model"}
    if kind == "full":
        assert trained == set(before)
    else:
        assert all("lora_" in name or ".score." in name for name in trained)
        assert any(".ref." in name for name in before) and not any(".ref." in name for name in trained)
    for module, earlier in ((reward_model, reward_before), (trainer.ref_model, reference)):
        assert all(torch.equal(module.get_parameter(name), item) for name, item in earlier.items())
    first, second = trainer.state.log_history[:2]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["policy/clip_fraction"] == 0
    assert second["objective/kl"] != 0 and second["loss/ptx"] > 0
    check_saved_models(trainer, tmp_path / "stage", {"quantization_config": NF4} if kind == "nf4" else {})
