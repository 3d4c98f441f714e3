"""Rollouts: padded tokens, advantages, minibatches, rows of all processes, and the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Sampler

from instructgpt_hf._compat.trainers import TokenLists
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.functional import gae, loss_denominator, masked_whiten, token_rewards, whiten_rewards
from instructgpt_hf.models.inputs import padded


class Tokens(NamedTuple):
    """Prompts [B, P], padded left, and one completion [B, T] for each, padded right; masks are 1 on tokens."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    @classmethod
    def pad(cls, prompt_ids: TokenLists, completion_ids: TokenLists, pad_token_id: int) -> Tokens:
        """Pad token lists; a completion without a token is a ValueError."""
        empty = [index for index, ids in enumerate(completion_ids) if not ids]
        if empty:
            raise ValueError(f"rollouts {empty[:5]} have no token; generation must return at least one per prompt.")
        cpu = torch.device("cpu")
        return cls(*padded(prompt_ids, pad_token_id, cpu, "left"), *padded(completion_ids, pad_token_id, cpu, "right"))

    def to(self, device: torch.device) -> Tokens:
        """Copy to a device."""
        return Tokens(*(item.to(device) for item in self))

    def joined(self) -> tuple[Tensor, Tensor, int]:
        """Ids [B, P+T], mask [B, P+T] and T: the arguments of `ActorCritic.forward`."""
        ids = torch.cat([self.prompt_ids, self.completion_ids], dim=1)
        mask = torch.cat([self.prompt_mask, self.completion_mask], dim=1)
        return ids, mask, self.completion_ids.shape[1]

    def lengths(self) -> Tensor:
        """Tokens [B] of each prompt with its completion."""
        return self.prompt_mask.sum(1) + self.completion_mask.sum(1)

    def select(self, rows: Tensor) -> Tokens:
        """Some rows, without the padding columns that none of them needs."""
        start = self.prompt_ids.shape[1] - int(self.prompt_mask[rows].sum(1).max())
        end = int(self.completion_mask[rows].sum(1).max())
        return Tokens(*(item[rows, start:] for item in self[:2]), *(item[rows, :end] for item in self[2:]))

    def by_length(self, size: int) -> Iterator[tuple[Tensor, Tokens]]:
        """All rows in pieces of at most `size` rows of similar length, which saves padding, with their row indices."""
        for rows in self.lengths().argsort(descending=True, stable=True).split(size):
            yield rows, self.select(rows)


class Rollouts(NamedTuple):
    """Sampled completions and the inputs of PPO's losses, fixed at rollout time: [B, T], 0 outside the mask.

    Log-probabilities are those of the policy that sampled the tokens, values those before each token, and returns the
    value model's targets.
    """

    tokens: Tokens
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> Rollouts:
        """Some rows, without the padding columns that none of them needs."""
        tokens = self.tokens.select(rows)
        end = tokens.completion_ids.shape[1]
        return Rollouts(tokens, *(item[rows, :end] for item in self[1:]))


def estimate_advantages(
    scores: Tensor, kl: Tensor, values: Tensor, mask: Tensor, beta: float, args: PPOConfig, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each [B, T], by GAE from the reward of every token (§3.5).

    The rewards are those of `functional.token_rewards`; rewards and advantages are whitened over all processes.
    """
    rewards = token_rewards(scores, kl, mask, beta)
    if args.whiten_rewards:
        rewards = over_all_processes(accelerator, whiten_rewards, rewards, mask)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = over_all_processes(accelerator, masked_whiten, advantages, mask)
    return advantages, returns


class MicroBatch(NamedTuple):
    """Rollouts of one forward and backward pass; by default a minibatch of their own.

    The denominators, scalars, divide the loss's sum over tokens: the mean over processes of the whole minibatch's
    tokens, or for the policy loss its sequences; None is the number of tokens here.
    """

    rollouts: Rollouts
    policy_denominator: Tensor | None = None
    value_denominator: Tensor | None = None


def split_minibatches(
    rollouts: Rollouts, minibatches: Iterable[Tensor], size: int, policy_reduction: str, accelerator: Accelerator
) -> list[MicroBatch]:
    """Split each minibatch into micro-batches of rows of similar length and attach its loss denominators.

    With the minibatch's denominators, gradients do not depend on how it is split. They are averaged over processes,
    because gradients are averaged too. Minibatches are given by their rows, `size` is the rows of a micro-batch, and
    `policy_reduction` is one of `functional.loss_denominator`.
    """
    lengths, micro_batches = rollouts.tokens.lengths(), []
    for rows in minibatches:
        rows = rows.to(lengths.device)
        rows = rows[lengths[rows].argsort(descending=True, stable=True)]
        pieces = [rollouts.select(part) for part in rows.split(size)]
        counts = [
            torch.stack([loss_denominator(piece.tokens.completion_mask, kind) for piece in pieces]).sum()
            for kind in (policy_reduction, "token_mean")
        ]
        shared = accelerator.reduce(torch.stack(counts).float(), reduction="mean")
        micro_batches += [MicroBatch(piece, *shared) for piece in pieces]
    return micro_batches


def draw_minibatches(
    episodes: int, minibatches: int, seed: int, process_index: int = 0, num_processes: int = 1
) -> tuple[Tensor, ...]:
    """Draw minibatches at random, the same for any number of processes.

    Of every `minibatches` consecutive episodes, each minibatch gets one, drawn at random. Each process holds an equal
    part of the consecutive episodes, so it holds an equal part of every minibatch, and nothing needs to be exchanged.

    Args:
        episodes: over all processes; a multiple of `minibatches * num_processes`.
        minibatches: how many to make.
        seed: the same on all processes.
        process_index: this process's place among those that share the episodes.
        num_processes: their number.

    Returns:
        For each minibatch, its rows among the episodes of this process.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(episodes // minibatches, minibatches, generator=generator).argsort(dim=1)
    rows = order + torch.arange(0, episodes, minibatches)[:, None]
    own = rows.chunk(num_processes)[process_index] - process_index * (episodes // num_processes)
    return own.T.unbind()


def gather_rows(accelerator: Accelerator, *tensors: Tensor) -> list[Tensor]:
    """The rows [B, T] of all processes, padded to the longest."""
    return [accelerator.gather(accelerator.pad_across_processes(item, dim=1)) for item in tensors]


def own_rows(accelerator: Accelerator, gathered: Tensor) -> Tensor:
    """This process's rows of a tensor gathered from all processes."""
    size = gathered.shape[0] // accelerator.num_processes
    return gathered[accelerator.process_index * size :][:size]


def over_all_processes(
    accelerator: Accelerator, statistic: Callable[[Tensor, Tensor], Tensor], values: Tensor, mask: Tensor
) -> Tensor:
    """Apply a statistic of values and mask, [N, T] to [N, T], to all processes' episodes; returns the own rows."""
    return own_rows(accelerator, statistic(*gather_rows(accelerator, values, mask)))[:, : values.shape[1]]


@dataclass(eq=False)
class EpisodeSampler(Sampler[int]):
    """Every prompt once per pass, in an order that depends on the seed and the number of the pass alone.

    TRL's own sampler draws each pass from one running generator, so a resumed run starts again with the first pass's
    order. Here the pass is computed from the optimizer steps taken, so a resumed run continues. As TRL's dataloader
    expects, the indices of an iteration are repeated for each of its micro-batches. Prompts that do not fill a last
    iteration of a pass are left for the next one.

    Args:
        size: number of prompts.
        episodes: prompts of one iteration, over all processes.
        repeats: micro-batches of one iteration on one process, times inner epochs.
        steps: optimizer steps of one iteration.
        seed: of the order.
        shuffle: False keeps the order of the dataset.
        step: returns the optimizer steps taken so far.
    """

    size: int
    episodes: int
    repeats: int
    steps: int
    seed: int
    shuffle: bool
    step: Callable[[], int]

    @property
    def iterations(self) -> int:
        """Whole iterations in a pass."""
        return self.size // self.episodes

    def __iter__(self) -> Iterator[int]:
        number = self.step() // (self.iterations * self.steps)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.size, generator=generator).tolist() if self.shuffle else list(range(self.size))
        for iteration in range(self.iterations):
            for _ in range(self.repeats):
                yield from order[iteration * self.episodes : (iteration + 1) * self.episodes]

    def __len__(self) -> int:
        return self.iterations * self.episodes * self.repeats
