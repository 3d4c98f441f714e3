"""What an answer is worth: reward models that read ids or text, Python functions, and how they become one score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import positions
from instructgpt_hf.models.sampling import is_finished
from instructgpt_hf.models.scoring import TextRewardModel, sequence_scores
from instructgpt_hf.trainers.ppo.rollouts import by_length, model_batch, pad_rollouts

if TYPE_CHECKING:
    from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

# TRL's signature: prompts, completions and completion_ids by keyword, then the dataset's other columns; None where the
# reward does not apply.
RewardFunction = Callable[..., Sequence[float | None]]
TokenLists = list[list[int]]


class RewardModelFunction:
    """A reward model as a TRL reward function that scores the very token ids that were sampled.

    TRL's own path decodes without special tokens and tokenizes again, so its reward model never sees EOS.

    Args:
        model: frozen reward model; its shift is applied.
        trainer: gives the prompt rendering, the padding id, the device and autocast.
        name: under which its mean is logged.
    """

    def __init__(self, model: Any, trainer: PPOTrainer, name: str = "reward_model") -> None:
        self.model = model
        self.trainer = trainer
        self.__name__ = name

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completion_ids: TokenLists, **_: Any) -> list[float]:
        trainer = self.trainer
        before, after, pad_token_id = self.read(prompts, completion_ids)
        batch = trainer.to_device(pad_rollouts(before, after, pad_token_id))
        scores = torch.zeros(len(prompts))
        for rows, piece in by_length(batch, trainer.args.per_device_eval_batch_size):
            ids, mask, _length = model_batch(piece)
            with trainer.accelerator.autocast():
                scores[rows.cpu()] = sequence_scores(self.model, ids, mask).float().cpu()
        return scores.tolist()

    def read(self, prompts: list[Any], completion_ids: TokenLists) -> tuple[TokenLists, TokenLists, int]:
        """Ids before and after the point where padding changes sides, at least one after it, and the padding id."""
        rendered = [self.trainer.render_prompt(prompt) for prompt in prompts]
        return rendered, completion_ids, self.trainer.tokenizer.pad_token_id


class TextRewardModelFunction(RewardModelFunction):
    """A `TextRewardModel` as a TRL reward function."""

    def __init__(self, reader: TextRewardModel, trainer: PPOTrainer, name: str = "reward_model") -> None:
        super().__init__(reader.model, trainer, name)
        self.reader = reader

    def read(self, prompts: list[Any], completion_ids: TokenLists) -> tuple[TokenLists, TokenLists, int]:
        """As above, in the reward model's own tokens."""
        trainer = self.trainer
        answers = [trainer.prompt_format.completion_text(ids, trainer.tokenizer) for ids in completion_ids]
        whole = self.reader.token_lists(prompts, answers, is_finished(completion_ids, trainer.eos_token_ids))
        _check_positions(whole, self.model, self.__name__)
        # An unfinished answer may have no text at all: then the score is read at the end of the prompt.
        return [ids[:-1] for ids in whole], [ids[-1:] for ids in whole], self.reader.tokenizer.pad_token_id


def _check_positions(token_lists: TokenLists, model: Any, name: str) -> None:
    """A text's length in the reward model's tokens is known only once it is sampled.

    Raises:
        InstructGPTError: naming the limit of the model's positions, which some architectures fail at.
    """
    longest, limit = max(map(len, token_lists)), positions(model.config)
    if limit is not None and longest > limit:
        raise InstructGPTError(
            f"{name}: a prompt with its answer has {longest} of the reward model's own tokens, and it has {limit} "
            "positions. Lower max_completion_length or max_prompt_length, or score with a model that reads more."
        )


def as_reward_functions(rewards: Any, trainer: PPOTrainer) -> list[RewardFunction]:
    """One reward or a list of rewards as TRL reward functions: reward models are wrapped, functions stay."""
    items = rewards if isinstance(rewards, (list, tuple)) else [rewards]
    functions: list[RewardFunction] = []
    for item in items:
        if isinstance(item, TextRewardModel):
            functions.append(TextRewardModelFunction(item, trainer))
        elif isinstance(item, nn.Module):
            functions.append(RewardModelFunction(item, trainer))
        else:
            functions.append(item)
    return functions


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that occurred before, so that every reward has a metric of its own."""
    found: list[str] = []
    for name in names:
        number, free = 2, name
        while free in found:
            number, free = number + 1, f"{name}_{number}"
        found.append(free)
    return found


def combined_scores(
    rewards: Tensor,
    weights: Tensor,
    finished: Tensor,
    clip_range: Sequence[float] | None = None,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
) -> Tensor:
    """One score per answer: the weighted sum of its rewards, clipped, then corrected if it is unfinished.

    Args:
        rewards: [B, R]; NaN where a reward does not apply, which then adds nothing.
        weights: [R].
        finished: [B] bool, whether the answer ends with EOS.
        clip_range: lowest and highest weighted sum.
        missing_eos_penalty: subtracted from the score of an unfinished answer.
        missing_eos_score: the score of an unfinished answer, whatever its rewards.

    Returns:
        [B].
    """
    scores = (rewards * weights.to(rewards.device)).nansum(dim=1)
    if clip_range is not None:
        scores = scores.clamp(*clip_range)
    if missing_eos_penalty is not None:
        scores = torch.where(finished, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        scores = torch.where(finished, scores, missing_eos_score)
    return scores
