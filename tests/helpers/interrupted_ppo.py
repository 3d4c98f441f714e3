"""PPO-ptx that is killed again and again, always resumed, and finally finishes.

Usage: python -m helpers.interrupted_ppo INPUT OUTPUT LORA KILL... with KILL as PLACE:COUNT. INPUT is that of ppo_step.
A process is forked for every KILL, trains from the last checkpoint, and sends itself SIGKILL when it comes to PLACE
for the COUNT-th time. The last one is not killed and writes models and log to OUTPUT/end. The last checkpoint after
each is printed.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
import transformers.trainer
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from helpers.ppo_step import build, is_clock
from instructgpt_hf._compat import checkpoints
from instructgpt_hf.trainers.ppo import state
from instructgpt_hf.trainers.ppo.ema import WeightAverage
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_of_the_weights(tensors, path):
    path.write_bytes(b"{" * 1000)
    die()


def half_of_the_state(trainer_state, path):
    Path(path).write_text('{"global_step":', encoding="utf-8")
    die()


def half_of_an_old_checkpoint(path, *_, **__):
    next(Path(path).glob("*/optimizer.pt")).unlink()
    die()


# Name of a place -> where it is, and what happens there instead.
PLACES = {
    "rollout": (PPOTrainer, "rewards", die),
    "pretraining": (PPOTrainer, "_pretraining_backward", die),
    "optimizer-step": (WeightAverage, "on_step_end", die),
    "weights": (state, "save_file", half_of_the_weights),
    "random-numbers": (transformers.trainer.Trainer, "_save_rng_state", die),
    "state": (TrainerState, "save_to_json", half_of_the_state),
    "rename": (checkpoints, "_move_into_place", die),
    "renamed": (checkpoints, "_keep_newest", die),
    "rotation": (shutil, "rmtree", half_of_an_old_checkpoint),
}


def prepare_to_die(place, count):
    owner, name, action = PLACES[place]
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        if place == "rotation" and not list(Path(args[0]).glob("*/optimizer.pt")):
            return original(*args, **kwargs)
        calls[0] += 1
        return (action if calls[0] == count else original)(*args, **kwargs)

    setattr(owner, name, counted)


def train(source, output, lora):
    trainer = build(
        source,
        output,
        4,
        2,
        True,
        lora,
        generation_batch_size=16,
        total_episodes=16 * 7,
        optim="adamw_torch",
        learning_rate=1e-2,
        value_learning_rate=1e-2,
        logging_steps=3,  # not with the iterations of 4 steps, nor with the checkpoints
        save_strategy="steps",
        save_steps=8,  # within the passes over the prompts, of 12 steps, and at their ends
        save_total_limit=1,
        num_iterations=2,
    )
    trainer.train(resume_from_checkpoint=True if output.is_dir() and get_last_checkpoint(output) else None)
    trainer.save_model(str(output / "end"))
    log = [{key: value for key, value in record.items() if not is_clock(key)} for record in trainer.state.log_history]
    (output / "end" / "log.json").write_text(json.dumps(log), encoding="utf-8")


def forked(work):
    """Exit status of a child that does the work, negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(source, output, lora, *kills):
    torch.set_num_threads(1)
    source, output = Path(source), Path(output)
    for kill in kills:
        place, count = kill.split(":")

        def work(place=place, count=int(count)):
            prepare_to_die(place, count)
            train(source, output, int(lora))

        status = forked(work)
        assert status == -signal.SIGKILL, f"{kill}: exit status {status}"
        last = get_last_checkpoint(output) if output.is_dir() else None
        print("killed", kill, Path(last).name if last else None, flush=True)
    assert forked(lambda: train(source, output, int(lora))) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
