"""What PPO writes: checkpoints, from which a run goes on as if it had never stopped, and the models for use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from instructgpt_hf.models.reward_model import save_reward_model

TRAINABLE_FILE = "trainable.safetensors"
AVERAGE_FILE = "ema.safetensors"
STATE_FILE = "ppo_state.json"
SAMPLES_FILE = "rollouts.jsonl"


def trainable_weights(module: nn.Module) -> dict[str, Tensor]:
    """What is trained of a module, by name."""
    return {name: item.detach().contiguous() for name, item in module.named_parameters() if item.requires_grad}


def write(trainer: Any, folder: Path) -> None:
    """Write what the Trainer's own files of a checkpoint lack.

    Args:
        trainer: a PPO trainer.
        folder: of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trainable_weights(trainer.actor_critic), folder / TRAINABLE_FILE)
    if trainer.average is not None:
        save_file(trainer.average.tensors(), folder / AVERAGE_FILE)
    state = {
        "pretraining": trainer.pretraining.state_dict() if trainer.pretraining is not None else None,
        "samples": trainer.samples,
        "unlogged": trainer.unlogged(),
        "beta": {"setting": trainer.args.beta, "current": trainer.beta},
        "warnings": trainer.guard.warnings.state_dict(),
    }
    (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


@torch.no_grad()
def read_weights(trainer: Any, folder: Path) -> None:
    """Read the trainable weights of both models."""
    saved = load_file(folder / TRAINABLE_FILE)
    for name, parameter in trainer.actor_critic.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved[name])


def read_state(trainer: Any, folder: Path) -> None:
    """Read everything else that `write` wrote."""
    if trainer.average is not None:
        trainer.average.load(load_file(folder / AVERAGE_FILE))
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    trainer.samples = state["samples"]
    trainer.add_callback(ContinueLog(trainer, state["unlogged"]))
    trainer.guard.warnings.load_state_dict(state["warnings"])
    if trainer.args.kl_target is not None and state["beta"]["setting"] == trainer.args.beta:
        trainer.beta = state["beta"]["current"]
    if trainer.pretraining is not None:
        trainer.pretraining.load_state_dict(state["pretraining"])


def write_models(trainer: Any, folder: Path) -> None:
    """Write the models for use, and the rollouts noted during training.

    Args:
        trainer: a PPO trainer.
        folder: gets the published policy; `value_model` in it the value model; `ema` or `raw` the other policy.
    """
    policy, average = trainer.actor_critic.policy, trainer.average
    save_reward_model(trainer.actor_critic.value_model, folder / "value_model")
    if average is None:
        _save_policy(policy, folder)
    else:
        last, averaged = ("", "ema") if trainer.args.publish_weights == "raw" else ("raw", "")
        _save_policy(policy, folder / last)
        with average.applied():
            _save_policy(policy, folder / averaged)
    for path in (folder, folder / "value_model"):
        trainer.tokenizer.save_pretrained(path)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in trainer.samples]
    (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")


def _save_policy(policy: Any, folder: Path) -> None:
    adapters = {"selected_adapters": ["default"]} if hasattr(policy, "peft_config") else {}
    policy.save_pretrained(folder, **adapters)


class ContinueLog(TrainerCallback):
    """Gives the log of a resumed run what the run before had measured and not logged yet.

    Args:
        trainer: an `OnPolicyTrainer`.
        unlogged: what its `unlogged` gave.
    """

    def __init__(self, trainer: Any, unlogged: dict[str, Any]) -> None:
        self.trainer = trainer
        self.unlogged: dict[str, Any] | None = unlogged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once: the Trainer has set up sums of its own just before."""
        if self.unlogged is not None:
            self.trainer.restore_unlogged(self.unlogged)
        self.unlogged = None
