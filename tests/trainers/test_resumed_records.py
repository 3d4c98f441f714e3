"""Records of a resumed SFT or reward trainer: those of the uninterrupted training, apart from clocks."""

import pytest
import torch
from datasets import Dataset
from helpers.ppo_step import is_clock
from helpers.reward_trainer import build_trainer
from transformers import TrainerCallback

from instructgpt_hf.config.training import SFTConfig
from instructgpt_hf.trainers.sft import SFTTrainer

# 7 rows make 4 steps of an epoch of which the last is smaller; logs of 3 steps lie across checkpoint and epoch.
SETTINGS = dict(max_steps=7, logging_steps=3, save_strategy="steps", save_steps=2, use_cpu=True, bf16=False)
SETTINGS |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, disable_tqdm=True)
SETTINGS |= dict(save_total_limit=None, lr_scheduler_type="constant", optim="sgd", per_device_eval_batch_size=4)


class StopAt(TrainerCallback):
    """Ends the training after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture(params=["sft", "reward"])
def build(request, tokenizer, make_policy, make_scorer, tmp_path):
    """A function that builds a trainer with a folder of its own."""

    def sft(folder):
        torch.manual_seed(0)
        rows = [{"input_ids": [*range(3, 9 + size)], "labels": [-100, *range(4, 9 + size)]} for size in range(7)]
        args = SFTConfig(str(folder), **SETTINGS)
        return SFTTrainer(make_policy(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    def reward(folder):
        torch.manual_seed(0)
        rows = [
            {"prompt_ids": [5, 6], "completion_ids": [[size + 2, 1], [size + 3, 9, 1]], "ranks": [1, 2]}
            for size in range(3, 10)
        ]
        return build_trainer(make_scorer(), tokenizer, folder, rows, **SETTINGS)

    return lambda name: (sft if request.param == "sft" else reward)(tmp_path / name)


def records(trainer):
    return [{key: value for key, value in item.items() if not is_clock(key)} for item in trainer.state.log_history]


def test_they_cover_all_steps(build, tmp_path):
    whole, parts = build("whole"), build("parts")
    whole.train()
    parts.add_callback(StopAt(2))
    parts.train()
    seconds = parts.state.log_history[-1]["train_runtime"]
    parts = build("parts")
    parts.add_callback(StopAt(4))
    parts.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert parts.state.log_history[-1]["train_runtime"] > seconds
    parts = build("parts")
    parts.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    final, expected = records(parts)[-1], records(whole)[-1]
    assert final["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    logged = [item for item in records(parts) if "loss" in item]
    assert [item["step"] for item in logged] == [3, 6]
    for item, other in zip(logged, [item for item in records(whole) if "loss" in item], strict=True):
        assert item == pytest.approx(other, rel=1e-6)
    last = parts.state.log_history[-1]
    assert last["train_runtime"] > seconds
    assert last["train_steps_per_second"] == pytest.approx(7 / last["train_runtime"], rel=0.02)
    whole_rate = whole.state.log_history[-1]["train_samples_per_second"] * whole.state.log_history[-1]["train_runtime"]
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(whole_rate, rel=0.02)


def test_a_second_training_of_the_same_trainer_begins_at_zero(build, tmp_path):
    trainer = build("again")
    trainer.train()
    first = records(trainer)[-1]
    trainer.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    assert records(trainer)[-1]["train_loss"] == pytest.approx(first["train_loss"], rel=1e-6)
    trainer.train()
    assert trainer._seconds_before == 0.0 and trainer._steps_before == 0
