"""The InstructGPT recipe (Ouyang et al. 2022) on the Hugging Face stack.

Importing the package loads no torch: every public name is imported on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "InstructGPTError": "instructgpt_hf.errors",
    "PPOConfig": "instructgpt_hf.config.ppo",
    "PPOTrainer": "instructgpt_hf.trainers.ppo.trainer",
    "PromptFormat": "instructgpt_hf.data.prompts",
    "RewardConfig": "instructgpt_hf.config.training",
    "RewardTrainer": "instructgpt_hf.trainers.reward",
    "SFTConfig": "instructgpt_hf.config.training",
    "SFTTrainer": "instructgpt_hf.trainers.sft",
    "StageArtifact": "instructgpt_hf.artifacts",
    "TextRewardModel": "instructgpt_hf.models.scoring",
    "create_reward_model": "instructgpt_hf.models.reward_model",
    "load_another_reward_model": "instructgpt_hf.models.shared_base",
    "load_policy": "instructgpt_hf.models.loading",
    "load_recipe": "instructgpt_hf.config.recipe",
    "load_reward_model": "instructgpt_hf.models.reward_model",
    "load_scorers": "instructgpt_hf.models.shared_base",
    "load_tokenizer": "instructgpt_hf.models.loading",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
