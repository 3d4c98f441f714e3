"""What the PPO trainer makes of the formulas, against loops over single completions with plain transformers models.

tests/functional checks the formulas by themselves. Here a setting that the trainer drops, or a tensor that it takes
from the wrong place, makes a difference.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.ppo_trainer import PROMPTS, records, snapshot
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from instructgpt_hf._compat.quirks import cache_name
from instructgpt_hf.functional import ppo_ptx_loss
from instructgpt_hf.trainers.ppo.rollouts import Rollouts, Tokens

EPISODES, EOS, SCORE_LIMIT = 16, 1, 1.0
# Narrow enough that each of them limits some tokens of models that have moved.
RANGES = dict(epsilon=0.1, epsilon_high=0.3, cliprange_value=0.5)


@pytest.fixture
def models(make_policy, make_scorer):
    """The four roles, under the names that `make_trainer` gives them."""
    policy, scorers = make_policy(), {"value_model": make_scorer(), "reward": make_scorer(seed=5)}
    with torch.no_grad():
        policy.lm_head.weight *= 5  # far from the reference
        policy.lm_head.weight[EOS] *= 8  # completions of different lengths, some of them equal
        for scorer in scorers.values():
            scorer.score.weight *= 20  # values and scores of the size of the KL penalty
    return {"policy": policy, "ref_model": make_policy(seed=7), **scorers}


def completions(batch, rows=range(EPISODES)):
    """Each row, the ids [1, S] of its prompt and completion without padding, and the length of the completion."""
    for row in rows:
        prompt = batch.tokens.prompt_ids[row][batch.tokens.prompt_mask[row].bool()]
        completion = batch.tokens.completion_ids[row][batch.tokens.completion_mask[row].bool()]
        yield row, torch.cat([prompt, completion])[None], len(completion)


def distributions(policy, ids, count):
    """Log-probabilities [n, V] before each token of a completion."""
    return policy(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1)


def log_probs(policy, ids, count):
    """Log-probability [n] of each token of a completion."""
    return distributions(policy, ids, count).gather(1, ids[0, -count:, None])[:, 0]


def head(scorer, ids):
    """The scalar head [S] at every token."""
    return scorer.score(scorer.model(input_ids=ids).last_hidden_state)[0, :, 0]


def whitened(rows, keep_mean=False):
    """The rows [n] with variance 1 over all of them, and mean 0 unless it is kept."""
    everything = torch.cat(rows)
    mean, deviation = everything.mean(), everything.std()
    return [(row - mean) / deviation + (mean if keep_mean else 0.0) for row in rows]


@torch.no_grad()
def rollout_by_hand(
    models,
    batch,
    beta,
    gamma=1.0,
    lam=0.95,
    kl_estimator="k1",
    reward_clip_range=None,
    whiten_rewards=False,
    whiten_advantages=True,
):
    """Advantages and returns [B, T]; each completion's score, before it is clipped, and KL to the reference."""
    rewards, values, scores, divergences = [], [], [], []
    for _, ids, count in completions(batch):
        log_ratio = log_probs(models["policy"], ids, count) - log_probs(models["ref_model"], ids, count)
        kl = log_ratio if kl_estimator == "k1" else (-log_ratio).exp() - 1 + log_ratio
        score = head(models["reward"], ids)[-1].item()
        low, high = reward_clip_range or (score, score)
        rewards.append(-beta * kl)
        rewards[-1][-1] += min(max(score, low), high)
        values.append(head(models["value_model"], ids)[-count - 1 : -1])
        scores.append(score)
        divergences.append(log_ratio.sum().item())
    if whiten_rewards:
        rewards = whitened(rewards, keep_mean=True)
    advantages = [torch.zeros_like(row) for row in values]
    for advantage, reward, value in zip(advantages, rewards, values, strict=True):
        following = running = 0.0
        for t in reversed(range(len(value))):
            running = reward[t] + gamma * following - value[t] + gamma * lam * running
            advantage[t], following = running, value[t]
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    if whiten_advantages:
        advantages = whitened(advantages)
    return pad_sequence(advantages, True), pad_sequence(returns, True), scores, divergences


def minibatch_by_hand(policy, value_model, batch, rows, reduction="sequence_sum"):
    """Losses and metrics of an update on some rows; also the shares of tokens below and above the ratio's range."""
    sums, tokens = {}, 0
    for row, ids, count in completions(batch, rows):
        names = "logps", "values", "advantages", "returns"
        old, old_values, advantages, returns = (getattr(batch, name)[row, :count] for name in names)
        distribution = distributions(policy, ids, count)
        log_ratio = distribution.gather(1, ids[0, -count:, None])[:, 0] - old
        ratio = log_ratio.exp()
        low, high = 1 - RANGES["epsilon"], 1 + RANGES["epsilon_high"]
        below, above = (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)
        values = head(value_model, ids)[-count - 1 : -1]
        change = values - old_values
        near = old_values + change.clamp(-RANGES["cliprange_value"], RANGES["cliprange_value"])
        error, near_error = (values - returns) ** 2, (near - returns) ** 2
        terms = {
            "loss/policy": -advantages * torch.where(below, low, torch.where(above, high, ratio)),
            "loss/value": 0.5 * torch.maximum(error, near_error),
            "objective/entropy": -(distribution.exp() * distribution).sum(1),
            # In double precision, because most digits of a small KL cancel.
            "policy/approx_kl": log_ratio.double().exp() - 1 - log_ratio,
            "policy/ratio": ratio,
            "policy/clip_fraction": below | above,
            "val/clip_fraction": (change.abs() > RANGES["cliprange_value"]) & (near_error > error),
            "below": below,
            "above": above,
        }
        sums = {name: sums.get(name, 0.0) + term.sum() for name, term in terms.items()}
        tokens += count
    counts = {"loss/policy": len(rows)} if reduction == "sequence_sum" else {}
    return {name: total / counts.get(name, tokens) for name, total in sums.items()}


@pytest.mark.parametrize(
    "settings",
    [
        dict(whiten_advantages=False),
        dict(),
        dict(whiten_advantages=False, kl_estimator="k3"),
        dict(whiten_advantages=False, whiten_rewards=True),
        dict(whiten_advantages=True, whiten_rewards=True),
        dict(whiten_advantages=False, reward_clip_range=[-SCORE_LIMIT, SCORE_LIMIT]),
    ],
    ids=["k1", "default", "k3", "whitened rewards", "both whitened", "clipped scores"],
)
def test_advantages_and_returns_follow_the_settings(make_trainer, models, settings):
    settings = dict(beta=0.5, gamma=0.98, lam=0.9, **settings)
    trainer = make_trainer(**models, **settings, max_completion_length=12)
    batch = trainer.rollout([PROMPTS[index] for index in range(EPISODES)])
    advantages, returns, scores, divergences = rollout_by_hand(models, batch, **settings)
    torch.testing.assert_close(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.returns, returns, rtol=1e-4, atol=1e-5)
    assert len(set(batch.tokens.completion_mask.sum(1).tolist())) > 1
    assert sum(abs(kl) for kl in divergences) > 1.0
    assert 0 < sum(abs(score) > SCORE_LIMIT for score in scores) < EPISODES, "the limit must be that of some scores"


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_gradients_of_a_minibatch_after_the_models_have_moved(make_trainer, models, reduction):
    sizes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    trainer = make_trainer(**models, **RANGES, **sizes, beta=0.5, vf_coef=0.3, policy_loss_reduction=reduction)
    batch, weights = trainer.rollout([PROMPTS[index] for index in range(EPISODES)]), trainer.actor_critic
    with torch.no_grad():
        for item in weights.parameters():
            item += 0.01 * torch.randn_like(item)
    found = minibatch_by_hand(models["policy"], models["value_model"], batch, range(EPISODES), reduction)
    for name in ("below", "above", "val/clip_fraction"):
        assert 0 < found[name] < 1, name
    (found["loss/policy"] + 0.3 * found["loss/value"]).backward()
    expected = {name: item.grad for name, item in weights.named_parameters()}
    weights.zero_grad()
    pieces = trainer.minibatches(batch)
    for piece in pieces:
        trainer.minibatch_loss(weights, piece).backward()
    assert len(pieces) == 4
    for name, item in weights.named_parameters():
        torch.testing.assert_close(
            item.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_accumulated_gradient_is_that_of_equation_2_as_one_sum(make_trainer, models):
    """Consecutive backward passes over pretraining text, values and policy, as one loss with one backward pass."""
    sizes = dict(
        per_device_train_batch_size=EPISODES, ptx_coef=2.0, ptx_episodes_ratio=2, ptx_loss_reduction="token_mean"
    )
    trainer = make_trainer(**models, **RANGES, **sizes, beta=0.5, vf_coef=0.3)
    model, inputs = trainer.actor_critic, [PROMPTS[index] for index in range(EPISODES)]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop
    stream = copy.deepcopy(trainer.pretraining)
    trainer.training_step(trainer.model_wrapped, inputs)
    accumulated = {name: item.grad for name, item in model.named_parameters()}
    model.zero_grad()
    (piece,) = trainer._buffered_inputs
    found = minibatch_by_hand(models["policy"], models["value_model"], piece.rollouts, range(EPISODES))
    text = torch.tensor([next(stream) for _ in range(2 * EPISODES)])
    lm = models["policy"](input_ids=text, labels=text).loss
    ppo_ptx_loss(found["loss/policy"], found["loss/value"], 0.3, lm, 2.0).backward()
    for name, item in model.named_parameters():
        torch.testing.assert_close(
            accumulated[name], item.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_adapted_beta_weighs_the_next_rollouts(make_trainer, models):
    # With a horizon of one iteration, beta changes by up to a fifth in each.
    trainer = make_trainer(**models, beta=0.5, kl_target=0.01, kl_horizon=EPISODES, learning_rate=1e-2)
    rollout, betas = trainer.rollout, [0.5]

    def compared(inputs):
        batch = rollout(inputs)
        advantages, returns, _, divergences = rollout_by_hand(models, batch, betas[-1])
        torch.testing.assert_close(batch.advantages, advantages, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.returns, returns, rtol=1e-4, atol=1e-5)
        error = sum(divergences) / EPISODES / 0.01 - 1
        betas.append(betas[-1] * (1 + min(max(error, -0.2), 0.2)))
        return batch

    trainer.rollout = compared
    trainer.train()
    assert betas == pytest.approx([0.5, 0.6, 0.72])


class Watch(TrainerCallback):
    """The rollouts of an iteration, the rows of each micro-batch, and the weights before each optimizer step."""

    def __init__(self, trainer):
        self.rows, self.weights = [], []
        self.module, self.rollout, self.loss = trainer.actor_critic, trainer.rollout, trainer.minibatch_loss
        trainer.rollout, trainer.minibatch_loss = self.watched_rollout, self.watched_loss
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        self.weights.append(snapshot(self.module))

    def watched_rollout(self, inputs):
        batch = self.rollout(inputs)
        self.batch = Rollouts(Tokens(*map(torch.clone, batch.tokens)), *map(torch.clone, batch[1:]))
        return batch

    def watched_loss(self, model, piece):
        # The prompts of an iteration are distinct.
        whole, part = (
            [ids[ids > 0].tolist() for ids in item.tokens.prompt_ids] for item in (self.batch, piece.rollouts)
        )
        self.rows.append([whole.index(prompt) for prompt in part])
        return self.loss(model, piece)


def rollout_metrics_by_hand(models, batch, beta):
    _, returns, scores, divergences = rollout_by_hand(models, batch, beta)
    tokens = [ids[0, -count:].tolist() for _, ids, count in completions(batch)]
    values = [batch.values[row, :count] for row, _, count in completions(batch)]
    returns = torch.cat([returns[row, :count] for row, _, count in completions(batch)])
    mean = sum(scores) / EPISODES
    return {
        "objective/scores": mean,
        "objective/scores_std": (sum((score - mean) ** 2 for score in scores) / EPISODES) ** 0.5,
        "objective/kl": sum(divergences) / EPISODES,
        "objective/rlhf_reward": mean - beta * sum(divergences) / EPISODES,
        "val/mean_value": sum(row.mean().item() for row in values) / EPISODES,
        "val/explained_variance": 1 - ((returns - torch.cat(values)).var() / returns.var()).item(),
        "completions/eos_rate": sum(completion[-1] == EOS for completion in tokens) / EPISODES,
        "completions/most_frequent": max(tokens.count(completion) for completion in tokens) / EPISODES,
        "num_tokens": sum(ids.shape[1] for _, ids, _ in completions(batch)),
    }


def test_the_log_of_an_iteration_with_two_passes_over_two_minibatches(make_trainer, models):
    # TRL ties the forward pass of a policy to it, so that copies made later would run with the first one's weights.
    plain = copy.deepcopy(models)
    sizes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=2)
    rates = dict(learning_rate=1e-3, value_learning_rate=3e-4, max_grad_norm=0.5)
    trainer = make_trainer(**models, **RANGES, **sizes, **rates, total_episodes=EPISODES, beta=0.5)
    watch = Watch(trainer)
    trainer.train()
    (record,), roles = records(trainer), torch.nn.ModuleDict({role: plain[role] for role in ("policy", "value_model")})
    expected = rollout_metrics_by_hand(plain, watch.batch, beta=0.5)
    assert 0 < expected["completions/eos_rate"] < 1 and expected["completions/most_frequent"] > 1 / EPISODES
    minibatches = [first + second for first, second in zip(watch.rows[::2], watch.rows[1::2], strict=True)]
    assert [sorted(minibatches[step] + minibatches[step + 1]) for step in (0, 2)] == [list(range(EPISODES))] * 2
    steps = []
    for weights, rows in zip(watch.weights, minibatches, strict=True):
        roles.load_state_dict(weights)
        found = minibatch_by_hand(**roles, batch=watch.batch, rows=rows)
        steps.append({name: item.item() for name, item in found.items() if "/" in name})
    expected |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    assert 0 < expected["policy/clip_fraction"] < 1 and 0 < expected["val/clip_fraction"] < 1
    expected["loss"] = expected["loss/policy"] + 0.1 * expected["loss/value"]
    (found["loss/policy"] + 0.1 * found["loss/value"]).backward()
    expected["grad_norm"] = torch.cat([item.grad.flatten() for item in roles.parameters()]).norm().item()
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_each_role_reads_each_completion_once(make_trainer, models):
    trainer = make_trainer(**models, per_device_eval_batch_size=4)
    passes = {role: [] for role in models}
    for role, model in models.items():

        def count(_module, _arguments, inputs, seen=passes[role]):
            # Generation keeps a cache, and the passes that score have none.
            if cache_name(inputs) is None:
                seen.append(len(inputs["input_ids"]))

        model.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.rollout([PROMPTS[index] for index in range(EPISODES)])
    assert passes == {role: [4, 4, 4, 4] for role in models}


@pytest.mark.parametrize(("published", "other"), [("raw", "ema"), ("ema", "raw")])
def test_published_weights_stand_at_the_root(make_trainer, models, tmp_path, published, other):
    trainer = make_trainer(**models, ema_decay=0.8, publish_weights=published)
    trainer.train()
    average = {name.removeprefix("policy."): item for name, item in trainer.average.tensors().items()}
    weights = {"raw": snapshot(models["policy"]), "ema": average}
    assert not any(torch.equal(item, average[name]) for name, item in weights["raw"].items())
    trainer.save_pretrained(tmp_path)
    for kind, folder in ((published, tmp_path), (other, tmp_path / other)):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == average.keys()
        assert all(torch.equal(item, weights[kind][name]) for name, item in saved.items()), kind
    assert not (tmp_path / published).exists()
