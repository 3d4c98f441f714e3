"""Files that PPO writes: its part of a checkpoint, beside the Trainer's own, and the models for use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from instructgpt_hf.artifacts import VALUE_FOLDER
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.models.reward_model import save_reward_model
from instructgpt_hf.trainers.ppo.ema import WeightAverage

TRAINABLE_FILE = "trainable.safetensors"
AVERAGE_FILE = "ema.safetensors"
STATE_FILE = "ppo_state.json"
SAMPLES_FILE = "rollouts.jsonl"


def trainable_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a module, by name."""
    return {name: item.detach().contiguous() for name, item in module.named_parameters() if item.requires_grad}


@dataclass(frozen=True)
class PPOState:
    """Contents of `ppo_state.json`, all plain JSON.

    Attributes:
        pretraining: position in the pretraining text; None for plain PPO.
        samples: lines of `rollouts.jsonl` so far.
        beta: weight of the KL penalty: `setting`, and `current` as adapted to `kl_target`.
        warnings: state of the early warnings.
    """

    pretraining: dict[str, Any] | None
    samples: list[dict[str, Any]]
    beta: dict[str, float]
    warnings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> PPOState:
        """Read the file of a checkpoint."""
        return cls(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        """Write the file of a checkpoint."""
        (folder / STATE_FILE).write_text(json.dumps(vars(self)), encoding="utf-8")


def write_weights(folder: Path, actor_critic: ActorCritic, average: WeightAverage | None) -> None:
    """Write the trainable weights of both models, and the policy's average, into a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trainable_weights(actor_critic), folder / TRAINABLE_FILE)
    if average is not None:
        save_file(average.tensors(), folder / AVERAGE_FILE)


@torch.no_grad()
def read_weights(folder: Path, actor_critic: ActorCritic) -> None:
    """Read the trainable weights of both models from a checkpoint."""
    saved = load_file(folder / TRAINABLE_FILE)
    for name, parameter in actor_critic.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved[name])


def read_average(folder: Path, average: WeightAverage) -> None:
    """Read the average of the policy's weights from a checkpoint."""
    average.load(load_file(folder / AVERAGE_FILE))


def write_models(
    folder: Path,
    actor_critic: ActorCritic,
    average: WeightAverage | None,
    save_tokenizer: Callable[[Path], None],
    samples: list[dict[str, Any]],
    publish_weights: str,
) -> None:
    """Write the models for use, and `samples` as `rollouts.jsonl`.

    The folder itself gets the policy of `publish_weights`, `"raw"` or `"ema"`; its subfolder `ema` or `raw` the other
    one, if there is an average; `value_model` the value model. `save_tokenizer` writes the tokenizer into a folder.
    """
    save_reward_model(actor_critic.value_model, folder / VALUE_FOLDER)
    if average is None:
        _save_policy(actor_critic.policy, folder)
    else:
        last, averaged = ("", "ema") if publish_weights == "raw" else ("raw", "")
        _save_policy(actor_critic.policy, folder / last)
        with average.applied():
            _save_policy(actor_critic.policy, folder / averaged)
    for path in (folder, folder / VALUE_FOLDER):
        save_tokenizer(path)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")


def _save_policy(policy: PreTrainedModel | PeftModel, folder: Path) -> None:
    adapters = {"selected_adapters": ["default"]} if hasattr(policy, "peft_config") else {}
    policy.save_pretrained(folder, **adapters)
