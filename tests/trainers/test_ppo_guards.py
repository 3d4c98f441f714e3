"""Early warnings of a PPO run, and where it stops: before NaN reaches the weights or a checkpoint."""

import functools
import math
from dataclasses import asdict

import pytest
import torch
from helpers.ppo_trainer import records
from safetensors.torch import load_file
from transformers import TrainerCallback

from instructgpt_hf._compat.checkpoints import last_checkpoint
from instructgpt_hf.trainers.ppo.watchdog import (
    KL_WARNING,
    SCALER_PATIENCE,
    EarlyWarnings,
    Guard,
    TrainingStopped,
    all_finite,
    share_of_most_frequent,
)

CALM = {
    "objective/kl": 3.0,
    "objective/entropy": 1.0,
    "completions/most_frequent": 0.1,
    "val/explained_variance": 0.3,
}


@pytest.fixture
def make_trainer(make_trainer):
    """Trainers of one pass of the prompts: four iterations of two optimizer steps."""
    return functools.partial(make_trainer, total_episodes=64)


def warned(series):
    """The number of the iteration, from 1, of each warning."""
    signs = EarlyWarnings()
    return [(number, text) for number, item in enumerate(series, 1) for text in signs.iteration({**CALM, **item})]


def test_a_calm_run_is_not_warned_about():
    assert warned([{}] * 50) == []


@pytest.mark.parametrize(
    ("metric", "series", "iteration", "words"),
    [
        ("objective/kl", [1, KL_WARNING, KL_WARNING + 1, 200, 1, 200], 3, "larger beta"),
        ("objective/entropy", [1.0, 0.11, 0.09, 0.09, 0.2, 0.09, 0.09, 0.09, 0.01], 8, "settles on one completion"),
        ("completions/most_frequent", [0.1, 0.6, 0.6, 0.4, 0.51, 0.6, 0.9, 1.0], 7, "90% of the completions"),
        ("val/explained_variance", [-1.0] * 25, 20, "value_learning_rate"),
        ("val/explained_variance", [0.0] * 25, 20, "no more than a constant"),
        ("val/explained_variance", [-1.0] * 15 + [0.1] + [-1.0] * 12, 26, "value_warmup_iterations"),
    ],
)
def test_each_sign_is_warned_about_once(metric, series, iteration, words):
    ((number, text),) = warned([{metric: value} for value in series])
    assert number == iteration
    assert words in text


def test_completions_of_one_word_from_the_start_are_no_collapse():
    assert warned([{"completions/most_frequent": 0.6}] * 10) == []


def test_a_resumed_run_goes_on_counting_and_does_not_repeat_itself():
    first = EarlyWarnings()
    for entropy in (1.0, 0.01, 0.01):
        assert first.iteration({"objective/entropy": entropy}) == []
    second = EarlyWarnings(**asdict(first))
    assert len(second.iteration({"objective/entropy": 0.01})) == 1
    third = EarlyWarnings(**asdict(second))
    assert third.iteration({"objective/entropy": 0.01}) == []


def test_warnings_reach_the_user_with_their_iteration(make_trainer, monkeypatch):
    monkeypatch.setattr("instructgpt_hf.trainers.ppo.watchdog.ENTROPY_SHARE", 1e9)
    trainer = make_trainer()
    texts = []
    trainer.guard.warn = texts.append
    trainer.train()
    assert len(texts) == 1 and texts[0].startswith("warning: iteration 3: the entropy has fallen to ")


def test_most_frequent_completion():
    assert share_of_most_frequent([[5, 1], [5], [5, 1], [6, 1]]) == 0.5


def test_finite_means_every_element_of_every_tensor():
    good, bad = torch.ones(2, 2), torch.tensor([1.0, math.inf])
    assert all_finite([good, good]) and not all_finite([good, bad]) and not all_finite([bad.log() * 0, good])


class Poison(TrainerCallback):
    """Makes one weight NaN before an optimizer step is taken, or its gradient."""

    def __init__(self, trainer, step, gradient):
        self.trainer, self.step, self.gradient = trainer, step, gradient

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.gradient:
            weight = self.trainer.actor_critic.policy.lm_head.weight
            weight.register_hook(lambda gradient: gradient * math.nan)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.gradient:
            self.trainer.actor_critic.policy.lm_head.weight.data[0, 0] = math.nan


def test_nan_in_a_gradient_stops_before_the_weights_and_names_the_last_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.add_callback(Poison(trainer, 3, gradient=True))
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    text = str(stop.value)
    assert "stopped in iteration 2, after 3 optimizer steps: grad_norm is nan" in text
    assert f"last good checkpoint: {tmp_path / 'work' / 'checkpoint-2'}" in text
    assert "smaller learning_rate" in text
    assert all_finite(list(trainer.actor_critic.parameters()))


@pytest.mark.parametrize("step", [2, 3])
def test_nan_in_a_weight_never_reaches_a_checkpoint(make_trainer, tmp_path, step):
    """Step 3 is the last of iteration 2, whose checkpoint is due next; after step 2, the loss shows it."""
    trainer = make_trainer(save_strategy="steps", save_steps=2, save_total_limit=None)
    trainer.add_callback(Poison(trainer, step, gradient=False))
    with pytest.raises(TrainingStopped, match=r"a weight is not a finite number|loss/policy is nan") as stop:
        trainer.train()
    assert "iteration 2" in str(stop.value) and "checkpoint-2\n" in str(stop.value)
    (saved,) = (tmp_path / "work").glob("checkpoint-*")
    assert all_finite(list(load_file(saved / "trainable.safetensors").values()))


def test_nan_score_of_a_reward_model_stops_before_anything_is_learned(make_trainer, make_scorer):
    reward_model = make_scorer(seed=5)
    reward_model.score.weight.data.fill_(math.nan)
    trainer = make_trainer(reward=reward_model)
    with pytest.raises(TrainingStopped, match="iteration 1, after 0 optimizer steps: a reward model's score is nan"):
        trainer.train()


def test_infinite_score_of_a_function_stops_and_one_that_does_not_apply_does_not(make_trainer):
    def infinite(completion_ids, **_):
        return [math.inf, *[0.0] * (len(completion_ids) - 1)]

    def sometimes(completion_ids, **_):
        return [None, *[0.0] * (len(completion_ids) - 1)]

    with pytest.raises(TrainingStopped, match=r"rewards/infinite is inf[\s\S]*try the reward function"):
        make_trainer("infinite", reward=infinite).train()
    make_trainer("sometimes", reward=sometimes, total_episodes=16).train()


def test_kl_above_its_limit_stops_and_sets_the_checkpoint_of_that_policy_aside(make_trainer, tmp_path):
    common = dict(learning_rate=5e-2, beta=0.0, save_strategy="steps", save_steps=2)
    free = make_trainer("free", **common)
    free.train()
    first, second, third, *_ = [record["objective/kl"] for record in records(free)]
    assert first < second < third, "the KL must grow for this test to say anything"
    trainer = make_trainer("limited", stop_kl=(second + third) / 2, **common)
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    text = str(stop.value)
    assert "stopped in iteration 3, after 4 optimizer steps: objective/kl is" in text and "above stop_kl" in text
    folder = tmp_path / "limited"
    assert f"last good checkpoint: {folder / 'checkpoint-2'}" in text
    assert sorted(item.name for item in folder.iterdir()) == ["_stopped-4", "checkpoint-2"]
    assert records(trainer)[-1]["objective/kl"] > (second + third) / 2, "the log says why"

    again = make_trainer("limited", stop_kl=(second + third) / 2, **common)
    with pytest.raises(TrainingStopped, match=r"after 4 optimizer steps[\s\S]*last good checkpoint: .*checkpoint-2\n"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert sorted(item.name for item in folder.iterdir()) == ["_stopped-4", "checkpoint-2"]


class Overflow(TrainerCallback):
    """Gives a model finite weights, as an optimizer step might, with which its outputs are not."""

    def __init__(self, weight, step):
        self.weight, self.step = weight, step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.weight.data.fill_(1e38)


@pytest.mark.parametrize(
    ("part", "found"),
    [("value_model.score", "val/mean_value is "), ("policy.lm_head", "The model's logits are not finite")],
)
def test_a_checkpoint_of_models_that_overflow_is_not_the_last_good_one(make_trainer, tmp_path, part, found):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.add_callback(Overflow(trainer.actor_critic.get_submodule(part).weight, step=3))
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    text = str(stop.value)
    assert "stopped in iteration 3, after 4 optimizer steps: " + found in text and "smaller learning_rate" in text
    assert f"last good checkpoint: {tmp_path / 'work' / 'checkpoint-2'}\n" in text
    assert sorted(item.name for item in (tmp_path / "work").iterdir()) == ["_stopped-4", "checkpoint-2"]


def test_a_table_of_completions_does_not_hide_a_stop(make_trainer):
    def infinite(completion_ids, log_extra, **_):
        log_extra("length", [len(ids) for ids in completion_ids])
        return [math.inf] * len(completion_ids)

    with pytest.raises(TrainingStopped, match="iteration 1, after 0 optimizer steps: rewards/infinite is inf"):
        make_trainer(reward=infinite, log_completions=True).train()


def test_an_interrupted_trainer_can_be_resumed(make_trainer, tmp_path):
    """In a notebook the same object trains again: with new rollouts, and with nothing that it saw before."""
    common = dict(save_strategy="steps", save_steps=2, save_total_limit=None, learning_rate=1e-2)
    whole = make_trainer("whole", **common)
    whole.train()
    trainer = make_trainer("resumed", **common)

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                trainer.guard.add("loss/policy", math.nan)
                raise KeyboardInterrupt

    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    for name, item in whole.actor_critic.state_dict().items():
        assert torch.equal(item, trainer.actor_critic.state_dict()[name]), name


def test_folders_that_are_no_checkpoints_are_none(tmp_path):
    (tmp_path / "checkpoint-99").touch()
    for name in ("checkpoint-best", "checkpoint-12", "checkpoint-9", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert last_checkpoint(tmp_path, before=12) == tmp_path / "checkpoint-9"


def test_what_a_reward_function_logs_need_not_be_finite(make_trainer):
    def reward(completion_ids, log_metric, **_):
        log_metric("share", math.nan)
        return [1.0] * len(completion_ids)

    trainer = make_trainer(reward=reward, total_episodes=32)
    trainer.train()
    assert records(trainer)[-1]["share"] is None, "as TRL logs what is not a number"


def test_without_a_checkpoint_the_message_says_so(make_trainer):
    trainer = make_trainer(learning_rate=1e-2, stop_kl=1e-9)
    with pytest.raises(TrainingStopped, match="there is no good checkpoint yet"):
        trainer.train()


def test_float16_may_leave_steps_out_until_its_scale_is_used_up(make_trainer):
    guard = Guard(make_trainer().args, lambda: True, gradients_are_scaled=True)
    for _ in range(SCALER_PATIENCE - 1):
        guard.gradient_done(5, torch.tensor(math.inf))
    guard.gradient_done(5, torch.tensor(1.0))  # a step that was taken: counting starts anew
    for _ in range(SCALER_PATIENCE - 1):
        guard.gradient_done(5, torch.tensor(math.inf))
    with pytest.raises(TrainingStopped, match="grad_norm is inf"):
        guard.gradient_done(5, torch.tensor(math.inf))
