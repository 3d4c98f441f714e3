"""PPO and PPO-ptx: what the trainer adds to the formulas, which tests/functional checks by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.ppo_trainer import PROMPTS, count_c, records, snapshot

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.functional import ppo_ptx_loss
from instructgpt_hf.trainers.ppo.rollouts import EpisodeSampler, Tokens, draw_minibatches
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer


def test_minibatches_are_optimizer_steps(make_trainer):
    trainer = make_trainer(num_iterations=2)
    trainer.train()
    # 2 iterations x 16 episodes / minibatches of 8 x 2 inner epochs
    assert trainer.state.global_step == 8
    assert [round(record["iteration"], 3) for record in trainer.state.log_history[:2]] == [1.0, 2.0]


def test_a_reward_the_policy_can_climb_is_climbed(make_trainer):
    trainer = make_trainer(
        generation_batch_size=32, per_device_train_batch_size=32, total_episodes=32 * 40, learning_rate=1e-2, beta=0.01
    )
    trainer.train()
    scores = [record["objective/scores"] for record in trainer.state.log_history if "objective/scores" in record]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0


@pytest.mark.parametrize(("ptx_coef", "reduction"), [(0.0, "token_mean"), (2.0, "token_mean"), (0.5, "sequence_sum")])
def test_splitting_a_minibatch_changes_nothing(make_trainer, make_policy, make_scorer, ptx_coef, reduction):
    """8 episodes at once and 4 x 2 with accumulation take the same optimizer steps, with completions of any length."""
    results = []
    for micro, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            generation_batch_size=8,
            total_episodes=8,
            ptx_coef=ptx_coef,
            policy_loss_reduction=reduction,
            ptx_loss_reduction=reduction,
            max_grad_norm=0.0,
            learning_rate=1e-2,
        )
        # SGD shows gradients as they are; Adam would hide their scale.
        groups = [
            {"params": list(trainer.actor_critic.policy.parameters()), "role": "policy"},
            {"params": list(trainer.actor_critic.value_model.parameters()), "role": "value_model"},
        ]
        trainer.optimizer = torch.optim.SGD(groups, lr=0.1)
        trainer.train()
        record = trainer.state.log_history[0]
        results.append((snapshot(trainer.actor_critic), record["loss/policy"], record["loss/value"]))
    (first, *losses), (second, *other_losses) = results
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(other_losses), rtol=1e-4, atol=1e-6)
    for name, item in first.items():
        torch.testing.assert_close(
            item, second[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# An example has 8 tokens, of which 7 are predicted.
@pytest.mark.parametrize(("reduction", "factor"), [("token_mean", 1), ("sequence_sum", 7)])
def test_ptx_gradient_is_the_coefficient_times_the_language_model_gradient(make_trainer, reduction, factor):
    trainer = make_trainer(
        ptx_coef=3.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        ptx_loss_reduction=reduction,
        ptx_episodes_ratio=3,
    )
    model = trainer.actor_critic
    stream = copy.deepcopy(trainer.pretraining)
    blocks = [next(stream) for _ in range(3 * 8)]
    ids = torch.tensor(blocks)
    expected_loss = model.policy(input_ids=ids, labels=ids).loss
    expected = torch.autograd.grad(expected_loss, list(model.policy.parameters()))
    for _ in range(2):
        trainer._pretraining_backward(model, trainer.pretraining)
    for item, gradient in zip(model.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(item.grad, 3.0 * factor * gradient)
    assert all(item.grad is None for item in model.value_model.parameters())
    assert trainer.pretraining.state_dict() == stream.state_dict()
    # Whatever the reduction, the metric is per token.
    recorded = trainer._metrics["train"]["loss/ptx"]
    assert sum(recorded) / len(recorded) == pytest.approx(expected_loss.item(), rel=1e-5)


def test_a_micro_batch_holds_the_activations_of_one_model_at_a_time(make_trainer):
    trainer = make_trainer(generation_batch_size=8, vf_coef=0.3)
    model, seen = trainer.actor_critic, []
    piece = trainer.minibatches(trainer.rollout([PROMPTS[index] for index in range(8)]))[0]
    output = model(*piece.rollouts.tokens.joined(), with_entropy=True)
    policy, value = (loss(lambda *_, **__: output, piece) for loss in (trainer._policy_loss, trainer._value_loss))
    joint = ppo_ptx_loss(policy, value, 0.3)
    weights = {role: model.role_parameters(role).values() for role in ("policy", "value_model")}
    expected = {role: torch.autograd.grad(joint, items, retain_graph=True) for role, items in weights.items()}
    done = lambda role: all(item.grad is not None for item in weights[role])  # noqa: E731
    model.policy.register_forward_pre_hook(lambda *_: seen.append(done("value_model")))
    loss = trainer.minibatch_loss(model, piece)
    assert seen == [True]
    loss.backward()
    assert loss.item() == joint.item()
    for role, items in weights.items():
        for item, gradient in zip(items, expected[role], strict=True):
            torch.testing.assert_close(item.grad, gradient, rtol=0, atol=0)


def test_gradients_of_both_terms_are_compared_in_every_iteration(make_trainer, make_policy):
    """Ratio and cosine against the two gradients of the first micro-batch, taken apart."""
    seen = []
    trainer = make_trainer(ptx_coef=3.0, max_grad_norm=0.0, learning_rate=1e-4)
    model, pretraining = trainer.actor_critic, trainer._pretraining_backward
    flat = lambda: torch.cat([item.grad.flatten() for item in model.policy.parameters()])  # noqa: E731

    def watched(*args):
        pretraining(*args)
        seen.append(flat())

    trainer._pretraining_backward = watched
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(flat()))
    trainer.train()
    records = [record for record in trainer.state.log_history if "grad_norm_ratio_ptx" in record]
    assert [record["iteration"] for record in records] == [1.0, 2.0]
    for record, (text, both) in zip(records, (seen[0:2], seen[4:6]), strict=True):
        other = both - text
        cosine = (text @ other / (text.norm() * other.norm())).item()
        assert record["grad_norm_ratio_ptx"] == pytest.approx((text.norm() / other.norm()).item(), rel=1e-3)
        assert record["grad_cosine_ptx"] == pytest.approx(cosine, abs=1e-3)


def test_ptx_coef_zero_reads_no_text_and_ptx_needs_text(make_trainer, tokenizer, make_policy, make_scorer):
    assert make_trainer(ptx_coef=0.0).pretraining is None
    trainer = make_trainer(ptx_coef=0.0)
    with pytest.raises(ValueError, match="ptx_coef=1\\.0 needs a pretraining_dataset"):
        PPOTrainer(
            make_policy(),
            count_c,
            PPOConfig(**{**trainer.args.to_dict(), "ptx_coef": 1.0, "max_steps": -1}),
            value_model=make_scorer(),
            train_dataset=PROMPTS,
            processing_class=tokenizer,
            prompt_format=trainer.prompt_format,
        )


def test_first_rollout_has_no_kl_and_the_ratio_starts_at_one(make_trainer):
    trainer = make_trainer(generation_batch_size=16, per_device_train_batch_size=16, total_episodes=16)
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert record["policy/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert record["objective/rlhf_reward"] == pytest.approx(record["objective/scores"], abs=1e-5)


def test_rollout_follows_the_definitions(make_trainer, make_policy, make_scorer):
    """Log-probabilities, values, rewards and advantages of a rollout against one row at a time in plain PyTorch."""
    reward_model = make_scorer(seed=5)
    other = make_policy(seed=7)
    settings = dict(whiten_advantages=False, beta=0.5, lam=0.9, max_completion_length=24)
    trainer = make_trainer(reward=reward_model, ref_model=other, **settings)
    trainer.model.train()
    inputs = [PROMPTS[index] for index in range(16)]
    batch = trainer.rollout(inputs)
    policy, value_model = trainer.actor_critic.policy, trainer.actor_critic.value_model
    lengths = set()
    for row in range(16):
        prompt = batch.tokens.prompt_ids[row][batch.tokens.prompt_mask[row].bool()]
        completion = batch.tokens.completion_ids[row][batch.tokens.completion_mask[row].bool()]
        lengths.add(len(completion))
        ids, start, count = torch.cat([prompt, completion])[None], len(prompt), len(completion)
        with torch.no_grad():
            logps, ref_logps = (
                model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1].gather(1, completion[:, None])[:, 0]
                for model in (policy, other)
            )
            values = value_model.score(value_model.model(input_ids=ids).last_hidden_state)[0, start - 1 : -1, 0]
            score = reward_model.score(reward_model.model(input_ids=ids).last_hidden_state)[0, -1, 0]
        rewards = -0.5 * (logps - ref_logps)
        rewards[-1] += score
        advantages = torch.zeros(count)
        for t in range(count):
            for k in range(t, count):
                following = values[k + 1] if k + 1 < count else 0.0
                advantages[t] += 0.9 ** (k - t) * (rewards[k] + following - values[k])
        for name, expected in (
            ("logps", logps),
            ("values", values),
            ("advantages", advantages),
            ("returns", advantages + values),
        ):
            torch.testing.assert_close(getattr(batch, name)[row, :count], expected, rtol=1e-4, atol=1e-5)
            assert not getattr(batch, name)[row, count:].any()
    assert len(lengths) > 1, "the rows must differ in length to say anything about padding"


def test_learning_rates(make_trainer):
    """The policy warms up over iterations from a tenth of the peak, the value model's rate is fixed (C.4)."""
    trainer = make_trainer(
        warmup_iterations=10, warmup_start_factor=0.1, learning_rate=1e-2, value_learning_rate=5e-3, total_episodes=320
    )
    trainer.create_optimizer()
    trainer.create_scheduler(40)
    rates = {"policy": [], "value_model": []}
    for _ in range(40):
        for group in trainer.optimizer.param_groups:
            rates[group["role"]].append(group["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    policy = rates["policy"][:: len(rates["policy"]) // 40]
    assert policy[0:2] == pytest.approx([1e-3, 1e-3])  # two optimizer steps per iteration
    assert policy[2:4] == pytest.approx([2e-3, 2e-3])
    assert policy[18:] == pytest.approx([1e-2] * 22)
    assert set(rates["value_model"]) == {5e-3}


def test_average_follows_its_recursion_and_is_saved_beside_the_policy(make_trainer, tmp_path):
    from safetensors.torch import load_file

    trainer = make_trainer(ema_decay=0.8, total_episodes=32)
    weight = trainer.actor_critic.policy.model.layers[0].mlp.up_proj.weight
    seen = [weight.detach().clone()]

    class Watch:
        def __call__(self, optimizer, *_):
            seen.append(weight.detach().clone())

    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(Watch())
    trainer.train()
    expected = seen[0]
    for item in seen[1:]:
        expected = 0.8 * expected + 0.2 * item
    trainer.save_pretrained(tmp_path / "stage")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(load_file(tmp_path / "stage" / "ema" / "model.safetensors")[name], expected)
    torch.testing.assert_close(load_file(tmp_path / "stage" / "model.safetensors")[name], weight)


@pytest.mark.parametrize(("ptx_coef", "step"), [(0.0, 4), (0.0, 12), (1.0, 12)])
def test_a_resumed_run_equals_the_uninterrupted_one(make_trainer, make_policy, tmp_path, ptx_coef, step):
    """Bit for bit on the CPU: weights of policy and value model, their average, and the log."""
    # 64 prompts and 16 episodes an iteration: a pass is 4 iterations, and step 12 lies in the second one.
    common = dict(ptx_coef=ptx_coef, ema_decay=0.9, total_episodes=128, save_strategy="steps", save_steps=4)
    whole = make_trainer(output_dir=str(tmp_path / "whole"), save_total_limit=None, **common)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.samples == whole.samples
    for name, item in resumed.actor_critic.named_parameters():
        assert torch.equal(item, whole.actor_critic.get_parameter(name)), name
    for name, item in resumed.average.tensors().items():
        assert torch.equal(item, whole.average.averages[name]), name
    metrics = ("objective/scores", "objective/kl", "loss/policy", "loss/value")
    assert [resumed.state.log_history[-2][key] for key in metrics] == [
        whole.state.log_history[-2][key] for key in metrics
    ]


def test_every_pass_has_its_own_order_that_a_resumed_run_continues():
    steps = 0
    sampler = EpisodeSampler(size=11, episodes=4, repeats=3, steps=2, seed=5, shuffle=True, step=lambda: steps)
    first = list(sampler)
    assert len(first) == len(sampler) == 2 * 4 * 3
    iterations = [first[start : start + 12] for start in (0, 12)]
    assert all(item == item[:4] * 3 for item in iterations), "an iteration's prompts, once for each micro-batch"
    assert len({*iterations[0][:4], *iterations[1][:4]}) == 8, "no prompt twice in a pass"
    steps = 4  # the optimizer steps of one pass
    second = list(sampler)
    assert second != first
    steps = 6  # resumed in the middle of the second pass
    assert list(sampler) == second


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_minibatches_do_not_depend_on_the_number_of_processes(processes):
    alone = [set(rows.tolist()) for rows in draw_minibatches(48, 3, seed=7)]
    assert sorted(row for rows in alone for row in rows) == list(range(48))
    shares = [draw_minibatches(48, 3, 7, index, processes) for index in range(processes)]
    size = 48 // processes
    assert all(len(rows) == 16 // processes for share in shares for rows in share)
    together = [
        {int(row) + index * size for index, share in enumerate(shares) for row in share[minibatch]}
        for minibatch in range(3)
    ]
    assert together == alone
    assert [set(rows.tolist()) for rows in draw_minibatches(48, 3, seed=8)] != alone


def test_too_few_prompts_are_refused(make_trainer):
    with pytest.raises(ValueError, match="64 prompts, fewer than generation_batch_size=128"):
        make_trainer(generation_batch_size=128, total_episodes=128)


def test_pieces_of_a_batch_keep_rows_and_lose_padding():
    tokens = Tokens.pad([[3], [3, 4, 5]], [[6, 7], [8, 9, 10, 1]], pad_token_id=0)
    assert tokens.prompt_ids.tolist() == [[0, 0, 3], [3, 4, 5]]
    assert tokens.completion_ids.tolist() == [[6, 7, 0, 0], [8, 9, 10, 1]]
    ids, mask, length = tokens.select(torch.tensor([0])).joined()
    assert (ids.tolist(), mask.tolist(), length) == ([[3, 6, 7]], [[1, 1, 1]], 2)
    rows = [index.tolist() for index, _ in tokens.by_length(1)]
    assert rows == [[1], [0]]
    with pytest.raises(ValueError, match="rollouts \\[1\\] have no token"):
        Tokens.pad([[3], [3]], [[6], []], pad_token_id=0)


@pytest.mark.parametrize("given", ["policy", "copy of the policy", "policy and reference"])
def test_a_model_that_another_trainer_had_runs_its_own_weights(make_trainer, make_policy, given):
    """TRL's trainers leave a `forward` on a model that its copies inherit, with the first model's weights."""
    first = make_policy()
    make_trainer(policy=first)
    policy = copy.deepcopy(first) if given == "copy of the policy" else first
    more = {"ref_model": copy.deepcopy(first)} if given == "policy and reference" else {}
    before = copy.deepcopy(first.state_dict())
    trainer = make_trainer(policy=policy, learning_rate=1e-2, **more)
    trainer.train()
    assert max(abs(record["objective/kl"]) for record in records(trainer)) > 0.01
    assert not torch.equal(policy.lm_head.weight, before["lm_head.weight"])
    reference, plain = trainer.ref_model, make_policy()
    plain.load_state_dict(before)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, plain(ids).logits)
        plain.load_state_dict(policy.state_dict())
        torch.testing.assert_close(policy(ids).logits, plain(ids).logits)
