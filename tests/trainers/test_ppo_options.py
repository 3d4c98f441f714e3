"""What the paper does not use: an adaptive KL weight and value-only iterations; and the clock of an iteration."""

import functools
import time

import pytest
import torch
from helpers.ppo_trainer import PROMPTS, records
from transformers import TrainerCallback

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.trainers.ppo.metrics import PhaseClock


@pytest.fixture
def make_trainer(make_trainer):
    """Trainers of one pass of the prompts: four iterations of two optimizer steps."""
    return functools.partial(make_trainer, total_episodes=64)


class Snapshots(TrainerCallback):
    """Weights of the policy, its average and its optimizer state after every optimizer step."""

    def __init__(self, trainer):
        self.trainer, self.taken = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        policy = self.trainer.actor_critic.role_parameters("policy")
        value = self.trainer.actor_critic.role_parameters("value_model")
        self.taken.append(
            {
                "policy": {name: item.detach().clone() for name, item in policy.items()},
                "average": {name: item.clone() for name, item in self.trainer.average.averages.items()},
                "value": {name: item.detach().clone() for name, item in value.items()},
                "states": len([item for item in policy.values() if self.trainer.optimizer.state.get(item)]),
                "rate": self.trainer.optimizer.param_groups[0]["lr"],
            }
        )


def same(first, second):
    return all(torch.equal(item, second[name]) for name, item in first.items())


@pytest.mark.parametrize("ptx_coef", [0.0, 1.0])
def test_value_warmup_leaves_the_policy_alone_bit_for_bit(make_trainer, ptx_coef):
    trainer = make_trainer(
        value_warmup_iterations=2, warmup_iterations=2, warmup_start_factor=0.5, ptx_coef=ptx_coef, weight_decay=0.1
    )
    policy = trainer.actor_critic.role_parameters("policy")
    start = {name: item.detach().clone() for name, item in policy.items()}
    value = {name: item.detach().clone() for name, item in trainer.actor_critic.role_parameters("value_model").items()}
    seen = Snapshots(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert len(seen.taken) == 8  # 4 iterations of 2 optimizer steps
    for step in seen.taken[:4]:
        assert same(start, step["policy"]) and same(start, step["average"])
        assert step["states"] == 0
    assert not same(value, seen.taken[0]["value"])
    assert not same(start, seen.taken[4]["policy"]) and not same(start, seen.taken[4]["average"])
    assert seen.taken[4]["states"] == len(policy)
    # The policy's own warm-up starts after it: rates before each optimizer step, seen after the step before it.
    assert [step["rate"] for step in seen.taken[:7]] == pytest.approx([0, 0, 0, 5e-4, 5e-4, 1e-3, 1e-3])
    log = records(trainer)
    assert [("loss/ptx" in record) for record in log] == [False, False, bool(ptx_coef), bool(ptx_coef)]
    assert [record["objective/kl"] for record in log[:3]] == pytest.approx([0.0] * 3, abs=1e-6)


def test_value_warmup_applies_the_value_loss_alone(make_trainer):
    trainer = make_trainer(value_warmup_iterations=1, vf_coef=0.5)
    trainer.model.train()
    piece = trainer.minibatches(trainer.rollout([PROMPTS[index] for index in range(16)]))[0]
    loss = trainer.minibatch_loss(trainer.model, piece)
    loss.backward()
    assert all(item.grad is None for item in trainer.actor_critic.role_parameters("policy").values())
    assert loss.item() == pytest.approx(0.5 * trainer.guard.values["loss/value"][0], rel=1e-5)


def test_value_warmup_drops_the_gradients_that_distributed_wrappers_need(make_trainer):
    trainer = make_trainer(value_warmup_iterations=1)
    for item in trainer.actor_critic.parameters():
        item.grad = torch.zeros_like(item)
    trainer.gradient_done(torch.tensor(1.0))
    assert all(item.grad is None for item in trainer.actor_critic.role_parameters("policy").values())
    assert all(item.grad is not None for item in trainer.actor_critic.role_parameters("value_model").values())


def test_value_warmup_resumes_in_its_middle(make_trainer, tmp_path):
    common = dict(
        value_warmup_iterations=2, total_episodes=48, save_strategy="steps", save_steps=2, save_total_limit=None
    )
    whole = make_trainer("whole", **common)
    whole.train()
    resumed = make_trainer("resumed", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, item in resumed.actor_critic.named_parameters():
        assert torch.equal(item, whole.actor_critic.get_parameter(name)), name


def test_beta_follows_the_kl_and_each_iteration_is_penalised_with_its_own(make_trainer):
    trainer = make_trainer(
        kl_target=0.01, kl_horizon=160, beta=0.5, learning_rate=1e-2, total_episodes=96, kl_estimator="k1"
    )
    trainer.train()
    log = records(trainer)
    beta = 0.5
    for record in log:
        assert record["objective/beta"] == pytest.approx(beta, rel=1e-6)
        assert record["objective/kl_penalty"] == pytest.approx(beta * record["objective/kl"], rel=1e-4, abs=1e-6)
        error = max(-0.2, min(0.2, record["objective/kl"] / 0.01 - 1))
        beta *= 1 + error * 16 / 160
    assert log[1]["objective/beta"] == pytest.approx(0.5 * 0.98)  # the first rollouts have no KL
    assert log[-1]["objective/beta"] > log[1]["objective/beta"]


def test_beta_does_not_adapt_while_only_the_value_model_trains(make_trainer):
    trainer = make_trainer(kl_target=1.0, kl_horizon=160, value_warmup_iterations=2)
    trainer.train()
    assert [record["objective/beta"] for record in records(trainer)][:3] == [0.02] * 3


def test_an_adapted_beta_resumes(make_trainer, tmp_path):
    common = dict(kl_target=0.01, kl_horizon=160, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    whole = make_trainer("whole", save_total_limit=None, **common)
    whole.train()
    resumed = make_trainer("resumed", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.beta == whole.beta != 0.02
    assert [record["objective/beta"] for record in records(resumed)] == [
        record["objective/beta"] for record in records(whole)
    ]
    for name, item in resumed.actor_critic.named_parameters():
        assert torch.equal(item, whole.actor_critic.get_parameter(name)), name
    # Another beta in the settings is a wish to start from it.
    other = make_trainer("other", beta=0.3, **common)
    other.load_models(str(tmp_path / "whole" / "checkpoint-4"))
    assert other.beta == 0.3


def test_a_resumed_run_has_the_learning_rates_of_its_settings(make_trainer, tmp_path):
    make_trainer("first", save_strategy="steps", save_steps=2, total_episodes=16).train()
    trainer = make_trainer("second", learning_rate=1e-5, value_learning_rate=2e-5, total_episodes=32)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert {group["role"]: group["lr"] for group in trainer.optimizer.param_groups} == {
        "policy": 1e-5,
        "value_model": 2e-5,
    }
    assert records(trainer)[-1]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kl_target=1.0, beta=0.0), "kl_target = 1.0: adapts beta, which must be above 0"),
        (dict(kl_target=5.0, stop_kl=5.0), r"kl_target = 5.0: must be below stop_kl \(5\)"),
        (dict(kl_target=5.0, kl_horizon=8), r"kl_horizon = 8: must be at least generation_batch_size \(16\)"),
        (dict(value_warmup_iterations=4), "must be below the 4 iterations of the stage"),
        (dict(value_warmup_iterations=2, max_steps=4), "must be below the 2 iterations of the stage"),
        (dict(stop_kl=0.0), "stop_kl = 0.0: must be greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make_trainer, changes, message):
    with pytest.raises(InstructGPTError, match=message):
        make_trainer(**changes)


def test_clock_gives_every_phase_its_seconds_and_tokens():
    times = iter([10.0, 12.0, 13.0, 17.0])
    seen = []
    clock = PhaseClock(2, lambda *item: seen.append(item), now=lambda: next(times))
    clock.end("generate", 5)  # before an iteration
    clock.start()
    clock.end("generate", 100)
    clock.end("score", 300)
    clock.training_tokens = 800
    state = type("State", (), {"global_step": 1})
    clock.on_step_end(None, state, None)
    state.global_step = 2
    clock.on_step_end(None, state, None)
    clock.end("generate", 5)  # rollouts of an evaluation, after the iteration
    assert seen == [
        *(("time/generate", 2.0), ("throughput/generate", 50.0)),
        *(("time/score", 1.0), ("throughput/score", 300.0)),
        *(("time/train", 4.0), ("throughput/train", 200.0)),
    ]


def test_the_pretraining_passes_are_part_of_training_time(make_trainer, monkeypatch):
    """Also the first one of an iteration, which comes before the first policy gradient."""
    trainer = make_trainer(ptx_coef=1.0, total_episodes=16)
    backward = trainer._pretraining_backward

    def slow(*arguments):
        time.sleep(0.25)
        backward(*arguments)

    monkeypatch.setattr(trainer, "_pretraining_backward", slow)
    trainer.train()
    (record,) = [item for item in trainer.state.log_history if "time/train" in item]
    passes = trainer.args.optimizer_steps_per_iteration * trainer.args.gradient_accumulation_steps
    assert record["time/train"] >= 0.25 * passes
    assert record["step_time"] >= 0.25 * trainer.args.gradient_accumulation_steps
    assert record["time/generate"] < 0.25


def test_phases_of_a_real_iteration(make_trainer):
    trainer = make_trainer(ptx_coef=1.0, num_iterations=2, total_episodes=16)
    trainer.train()
    (record,) = records(trainer)
    tokens = {
        phase: record[f"time/{phase}"] * record[f"throughput/{phase}"] for phase in ("generate", "score", "train")
    }
    assert tokens["generate"] == pytest.approx(16 * record["completions/mean_length"])
    assert tokens["score"] == pytest.approx(record["num_tokens"])
    # Both inner epochs, and 1 pretraining example of 8 tokens for each episode in each of them.
    assert tokens["train"] == pytest.approx(2 * (record["num_tokens"] + 16 * 8))
