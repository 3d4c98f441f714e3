"""Rewards of completions: reward models that read ids or text, Python functions, and how they become one score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import positions
from instructgpt_hf.models.sampling import is_finished
from instructgpt_hf.models.scoring import TextRewardModel, sequence_scores
from instructgpt_hf.trainers.ppo.functions import RewardFunction, checked
from instructgpt_hf.trainers.ppo.rollouts import TokenLists, Tokens

Reward = nn.Module | TextRewardModel | RewardFunction


@dataclass(frozen=True)
class SampledIds:
    """Reader of a reward model that shares the policy's tokenizer: the very ids that were sampled, EOS included.

    TRL's own path decodes without special tokens and tokenizes again, so its reward model never sees EOS.
    """

    prompt_format: PromptFormat
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: Sequence[int]

    def __call__(self, prompts: list[Prompt], completion_ids: TokenLists) -> Tokens:
        rendered = [self.prompt_format.prompt_ids(prompt, self.tokenizer) for prompt in prompts]
        return Tokens.pad(rendered, completion_ids, self.tokenizer.pad_token_id)

    def texts(self, prompts: list[Prompt], completion_ids: TokenLists) -> list[str]:
        """The text of each completion, without what the prompt format writes around it."""
        return [
            self.prompt_format.completion_text(prompt, ids, self.tokenizer)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]


@dataclass(frozen=True)
class OwnTokens:
    """Reader of a reward model with another tokenizer: the text of the completions in the model's own tokens."""

    policy: SampledIds
    model: TextRewardModel

    def __call__(self, prompts: list[Prompt], completion_ids: TokenLists) -> Tokens:
        policy, tokenizer = self.policy, self.model.tokenizer
        texts = policy.texts(prompts, completion_ids)
        whole = self.model.token_lists(prompts, texts, is_finished(completion_ids, policy.eos_token_ids))
        # Known only now, and beyond the limit some architectures fail with an obscure error.
        longest, limit = max(map(len, whole)), positions(self.model.model.config)
        if limit is not None and longest > limit:
            raise InstructGPTError(
                f"reward_model: a prompt with its completion has {longest} of the reward model's own tokens, and it "
                f"has {limit} positions. Lower max_completion_length or max_prompt_length, or score with a model that "
                "reads more."
            )
        # An unfinished completion may have no text at all: then the score is read at the end of the prompt.
        return Tokens.pad([ids[:-1] for ids in whole], [ids[-1:] for ids in whole], tokenizer.pad_token_id)


@dataclass(eq=False)
class RewardModelFunction:
    """A reward model as a TRL reward function.

    Attributes:
        model: frozen reward model; its shift is applied.
        reader: turns prompts and completion ids into the model's tokens; the score is read at the last one.
        accelerator: gives the device and autocast.
        batch_size: rows per forward pass.
    """

    model: nn.Module
    reader: Callable[[list[Prompt], TokenLists], Tokens]
    accelerator: Accelerator
    batch_size: int
    __name__ = "reward_model"  # under which TRL logs its mean

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completion_ids: TokenLists, **_: Any) -> list[float]:
        tokens = self.reader(prompts, completion_ids).to(self.accelerator.device)
        scores = torch.zeros(len(prompts))
        for rows, piece in tokens.by_length(self.batch_size):
            ids, mask, _length = piece.joined()
            with self.accelerator.autocast():
                scores[rows.cpu()] = sequence_scores(self.model, ids, mask).float().cpu()
        return scores.tolist()


def placeholder(reward: Reward) -> RewardFunction:
    """Reward for TRL's constructor: the function itself, or for a model a stand-in with the model's name.

    TRL counts and names the rewards before there is an accelerator, which `as_reward_functions` needs.
    """
    if not isinstance(reward, (nn.Module, TextRewardModel)):
        return reward

    def reward_model(**_: Any) -> list[float]:
        raise NotImplementedError

    return reward_model


def as_reward_functions(
    rewards: Sequence[Reward], sampled: SampledIds, accelerator: Accelerator, batch_size: int
) -> list[RewardFunction]:
    """Rewards as TRL reward functions: reward models are wrapped, functions are checked at every call."""

    def function(reward: Reward) -> RewardFunction:
        if isinstance(reward, TextRewardModel):
            return RewardModelFunction(reward.model, OwnTokens(sampled, reward), accelerator, batch_size)
        if isinstance(reward, nn.Module):
            return RewardModelFunction(reward, sampled, accelerator, batch_size)
        return checked(reward)

    return [function(reward) for reward in rewards]


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that occurred before, so that every reward has a metric of its own."""
    result: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in result:
            number, candidate = number + 1, f"{name}_{number}"
        result.append(candidate)
    return result


def combined_scores(
    rewards: Tensor,
    weights: Tensor,
    finished: Tensor,
    clip_range: Sequence[float] | None = None,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
) -> Tensor:
    """One score [B] per completion: the weighted sum of its rewards, clipped, then corrected if it is unfinished.

    Args:
        rewards: [B, R]; NaN where a reward does not apply, which then adds nothing.
        weights: [R].
        finished: [B] bool, whether the completion ends with EOS.
        clip_range: lowest and highest weighted sum.
        missing_eos_penalty: subtracted from the score of an unfinished completion.
        missing_eos_score: the score of an unfinished completion, whatever its rewards.
    """
    scores = (rewards * weights.to(rewards.device)).nansum(dim=1)
    if clip_range is not None:
        scores = scores.clamp(*clip_range)
    if missing_eos_penalty is not None:
        scores = torch.where(finished, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        scores = torch.where(finished, scores, missing_eos_score)
    return scores
