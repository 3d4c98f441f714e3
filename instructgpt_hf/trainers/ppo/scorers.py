"""The reward models and the value model of PPO, from names or models in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf._compat.quirks import use_own_forward
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.adapters import POLICY_ADAPTER
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.origins import base_model_folder, resolve_source
from instructgpt_hf.models.reward_model import AdapterScorer, Scorer, load_reward_model, with_head
from instructgpt_hf.models.scoring import TextRewardModel
from instructgpt_hf.models.shared_base import adapter_beside_whole, load_another_reward_model, load_scorers
from instructgpt_hf.models.value_model import value_model_of
from instructgpt_hf.trainers.inputs import chosen_format, recorded_format
from instructgpt_hf.trainers.ppo.rewards import Reward

logger = logging.getLogger(__name__)


def listed(rewards: Any) -> list[Any]:
    """One reward or several as a list."""
    return list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]


@dataclass
class Scorers:
    """Loads the models that score beside a policy.

    Attributes:
        policy: ready to train; its base is shared where possible.
        tokenizer: the policy's.
        prompt_format: the policy's.
        seed: seed of a fresh head.
        peft_config: adapter of the value model; None trains all of its weights, or the adapter that it has.
        options: keyword arguments of `from_pretrained`.
        value_model: the one given, or the copy of the first reward model that reads the policy's token ids.
    """

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    seed: int
    peft_config: LoraConfig | None
    options: dict[str, Any]
    value_model: Scorer | None = None

    def load(
        self, rewards: Sequence[Any], tokenizers: Sequence[PreTrainedTokenizerBase | None], value_model: Any
    ) -> tuple[list[Reward], Scorer, bool]:
        """All rewards, the value model, and whether its head is random.

        Args:
            rewards: names of reward models, models in memory, `TextRewardModel`s and functions.
            tokenizers: of the reward models, where they are not their own or the policy's.
            value_model: name or model; None starts it as a copy of the first reward model that reads the policy's
                token ids, or without one as a copy of the policy.

        Raises:
            InstructGPTError: naming the model that is missing or does not fit.
        """
        if value_model is not None:
            if any(value_model is reward for reward in rewards):
                raise InstructGPTError(
                    "value_model: is the reward model itself, which stays frozen; leave it out, and a copy is trained."
                )
            self.value_model = self._given_value_model(value_model)
        if len(tokenizers) != len(rewards):
            raise InstructGPTError(
                f"reward_processing_classes: has {len(tokenizers)} tokenizers for {len(rewards)} rewards; None stands "
                "for a reward that needs none."
            )
        loaded = [self._reward(reward, own) for reward, own in zip(rewards, tokenizers, strict=True)]
        fresh = self.value_model is None
        if self.value_model is None:
            self.value_model = value_model_of(self.policy, self.tokenizer, self.seed)
        return loaded, self.value_model, fresh

    def _given_value_model(self, value_model: Any) -> Scorer:
        if isinstance(value_model, (str, Path)):
            folder = resolve_source(str(value_model), role="value_model")
            if not self._same_vocabulary(load_tokenizer(folder)):
                raise InstructGPTError(
                    f"value_model: {value_model}: has another tokenizer than the policy, whose token ids it reads."
                )
            value_model = load_reward_model(folder, trainable=True, **self.options)
        if self.peft_config is not None and isinstance(value_model, PreTrainedModel):
            value_model = get_peft_model(value_model, with_head(self.peft_config))
        return value_model

    def _reward(self, reward: Any, tokenizer: PreTrainedTokenizerBase | None) -> Reward:
        if isinstance(reward, (str, Path)):
            return self._by_name(resolve_source(str(reward), role="reward_funcs"), tokenizer)
        if isinstance(reward, TextRewardModel) or (callable(reward) and not isinstance(reward, nn.Module)):
            return reward
        if not isinstance(reward, nn.Module):
            raise InstructGPTError(
                f"reward_funcs: found a {type(reward).__name__}; each must be a function, a reward model, or its name."
            )
        own, folder = (tokenizer, None) if tokenizer is not None else self._own_tokenizer(reward)
        if own is not None and not self._reads_ids(own, folder):
            return TextRewardModel(reward, own, chosen_format(None, own, folder))
        if self.value_model is None:
            reward, self.value_model = self._with_value_model(reward)
        return reward

    def _by_name(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Reward:
        own = tokenizer or load_tokenizer(folder)
        if not self._reads_ids(own, folder):
            model = load_reward_model(folder, **self.options)
            return TextRewardModel(model, own, chosen_format(None, own, folder))
        if self.value_model is not None:
            return load_another_reward_model(self.policy, self.value_model, folder, **self.options)
        reward, self.value_model = load_scorers(self.policy, folder, peft_config=self.peft_config, **self.options)
        return reward

    def _own_tokenizer(self, model: nn.Module) -> tuple[PreTrainedTokenizerBase | None, Path | None]:
        """Tokenizer and folder of a whole model in memory; None where it does not say where it comes from."""
        name = getattr(model, "name_or_path", "") if isinstance(model, PreTrainedModel) else ""
        if not name:
            return None, None
        try:
            folder = base_model_folder(name, None, "reward_funcs")
            return load_tokenizer(folder), folder
        except InstructGPTError:  # moved or without a tokenizer: taken to read the policy's token ids
            return None, None

    def _reads_ids(self, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> bool:
        """Whether a reward model reads the policy's token ids rather than text."""
        return self._same_vocabulary(tokenizer) and recorded_format(folder) in (None, self.prompt_format)

    def _same_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        return tokenizer.get_vocab() == self.tokenizer.get_vocab()

    def _with_value_model(self, reward: nn.Module) -> tuple[Scorer, Scorer]:
        """The reward model, and the value model that starts as its copy."""
        if isinstance(reward, PreTrainedModel) and self.peft_config is not None:
            return adapter_beside_whole(reward, self.peft_config)
        if isinstance(reward, AdapterScorer):
            raise InstructGPTError(
                "value_model: the reward model is an adapter on a shared base; pass the value model that "
                "load_scorers returned with it."
            )
        value_model: Any = copy.deepcopy(reward)
        if isinstance(value_model, PeftModel):
            use_own_forward(value_model)
            value_model.peft_config[POLICY_ADAPTER].inference_mode = False
            value_model.set_adapter(POLICY_ADAPTER)
        elif isinstance(value_model, PreTrainedModel):
            use_own_forward(value_model)
            value_model.requires_grad_(True)
        return reward, value_model  # type: ignore[return-value]
