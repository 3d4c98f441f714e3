"""Judges: who scores the completions of the policies."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from peft import PeftModel
from transformers import PreTrainedModel

from instructgpt_hf import lab
from instructgpt_hf.data.prompts import Prompt
from instructgpt_hf.models.scoring import TextRewardModel, score_token_lists


class SampledCompletions(NamedTuple):
    """One completion by one policy for each of N prompts, which are as the dataset holds them.

    `completion_ids` end with EOS where the completion is finished; `texts` are without special tokens.
    """

    prompts: Sequence[Prompt]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    texts: list[str]
    finished: list[bool]


class Judge(Protocol):
    """Scores completions, the better the higher; `independent` if no policy was trained on the scores."""

    name: str
    independent: bool

    def scores(self, sampled: SampledCompletions) -> list[float]:
        """One score per completion."""


class GoldLabeler:
    """The lab's gold labeler, which knows what is true in its micro-world."""

    name = "the lab's gold labeler"
    independent = True

    def scores(self, sampled: SampledCompletions) -> list[float]:
        """The labeler's score of each text, without the noise of its rankings."""
        return lab.gold_scores([str(prompt) for prompt in sampled.prompts], sampled.texts)


@dataclass(frozen=True)
class RewardModelJudge:
    """The reward model that PPO trained on, a sequence classifier with a scalar head; reads the policy's token ids."""

    model: PreTrainedModel | PeftModel
    pad_token_id: int
    batch_size: int
    name = "the reward model it was trained on"
    independent = False

    def scores(self, sampled: SampledCompletions) -> list[float]:
        """The shifted score at the last token of each prompt with its completion."""
        pairs = zip(sampled.prompt_ids, sampled.completion_ids, strict=True)
        return score_token_lists(self.model, [a + b for a, b in pairs], self.pad_token_id, self.batch_size)


@dataclass(frozen=True)
class TextRewardModelJudge:
    """The reward model that PPO trained on, where it has a tokenizer or prompt format of its own and reads text."""

    reward: TextRewardModel
    batch_size: int
    name = RewardModelJudge.name
    independent = False

    def scores(self, sampled: SampledCompletions) -> list[float]:
        """The shifted score of each prompt with its completion, as the model's own training rendered them."""
        ids = self.reward.token_lists(sampled.prompts, sampled.texts, sampled.finished)
        return score_token_lists(self.reward.model, ids, self.reward.tokenizer.pad_token_id, self.batch_size)


@dataclass(frozen=True)
class RewardFunctionsJudge:
    """The reward functions that PPO trained on, where it had no reward model.

    Attributes:
        functions: with TRL's signature.
        weights: one for each function.
        columns: the other columns of the prompts, which the functions read.
    """

    functions: Sequence[Callable[..., Any]]
    weights: Sequence[float]
    columns: Mapping[str, Sequence[Any]]
    name = "the reward functions it was trained on"
    independent = False

    def scores(self, sampled: SampledCompletions) -> list[float]:
        """The weighted sum of the functions' values; None adds nothing."""
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(sampled.prompts, sampled.texts, strict=True)
        ]
        inputs: dict[str, Any] = {"prompts": list(sampled.prompts), "completions": completions, **self.columns}
        inputs |= {"completion_ids": sampled.completion_ids, "trainer_state": None}
        inputs |= {"log_metric": lambda name, value: None, "log_extra": lambda column, values: None}
        scores = [0.0] * len(completions)
        for function, weight in zip(self.functions, self.weights, strict=True):
            values = function(**inputs)
            if inspect.iscoroutine(values):
                values = asyncio.run(values)
            scores = [score + weight * (value or 0.0) for score, value in zip(scores, values, strict=True)]
        return scores
