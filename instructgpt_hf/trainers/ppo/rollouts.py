"""Padded batches of rollouts: building them, slicing them into micro-batches, trimming padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from instructgpt_hf._compat.trainers import pad

# Tensors whose columns are prompt tokens and those whose columns are completion tokens.
PROMPT_KEYS = ("prompt_ids", "prompt_mask")
Batch = dict[str, Tensor]


def pad_rollouts(prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_token_id: int) -> Batch:
    """Token lists as tensors: prompts padded left, completions padded right.

    Returns:
        `prompt_ids` [B, P], `prompt_mask` [B, P], `completion_ids` [B, T], `completion_mask` [B, T].

    Raises:
        ValueError: if a completion is empty; every rollout has at least one token.
    """
    empty = [index for index, ids in enumerate(completion_ids) if not ids]
    if empty:
        raise ValueError(f"rollouts {empty[:5]} have no token; generation must return at least one per prompt.")
    batch = {}
    for name, rows, side in (("prompt", prompt_ids, "left"), ("completion", completion_ids, "right")):
        tensors = [torch.tensor(ids, dtype=torch.long) for ids in rows]
        batch[f"{name}_ids"] = pad(tensors, padding_value=pad_token_id, padding_side=side)
        batch[f"{name}_mask"] = pad([torch.ones_like(item) for item in tensors], padding_value=0, padding_side=side)
    return batch


def model_batch(batch: Batch) -> tuple[Tensor, Tensor, int]:
    """Ids [B, P+T], mask [B, P+T] and T of a padded batch."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, mask, batch["completion_ids"].shape[1]


def select(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, without the padding columns that none of them needs."""
    prompts = int(batch["prompt_mask"][rows].sum(1).max())
    completions = int(batch["completion_mask"][rows].sum(1).max())
    width = batch["prompt_ids"].shape[1]
    return {
        key: value[rows, width - prompts :] if key in PROMPT_KEYS else value[rows, :completions]
        for key, value in batch.items()
    }


def by_length(batch: Batch, size: int) -> Iterator[tuple[Tensor, Batch]]:
    """The whole batch in pieces of at most `size` rows of similar length, with their row indices.

    For passes without gradient, where the order of rows does not matter and padding is pure cost.
    """
    everything = torch.arange(batch["prompt_mask"].shape[0], device=batch["prompt_mask"].device)
    for rows in sorted_by_length(batch, everything).split(size):
        yield rows, select(batch, rows)


def sorted_by_length(batch: Batch, rows: Tensor) -> Tensor:
    """The given rows, longest first, so that neighbours need little padding."""
    lengths = batch["prompt_mask"][rows].sum(1) + batch["completion_mask"][rows].sum(1)
    return rows[lengths.argsort(descending=True, stable=True)]


def deal(
    episodes: int, minibatches: int, seed: int, process_index: int = 0, num_processes: int = 1
) -> tuple[Tensor, ...]:
    """Random minibatches that are the same for any number of processes.

    Of every `minibatches` consecutive episodes, each minibatch gets one, drawn at random. Each process holds an equal
    part of the consecutive episodes, so it holds an equal part of every minibatch, and nothing needs to be exchanged.

    Args:
        episodes: over all processes; a multiple of `minibatches * num_processes`.
        minibatches: how many to make.
        seed: the same on all processes.
        process_index: holds the episodes from `process_index * episodes / num_processes`.
        num_processes: that share the episodes.

    Returns:
        For each minibatch, its rows among the episodes of this process.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(episodes // minibatches, minibatches, generator=generator).argsort(dim=1)
    rows = order + torch.arange(0, episodes, minibatches)[:, None]
    mine = rows.chunk(num_processes)[process_index] - process_index * (episodes // num_processes)
    return mine.T.unbind()


def place(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values [b, t] of some rows into a wider target [B, T], in place."""
    target[rows, : values.shape[1]] = values.to(target.dtype)


class EpisodeSampler(Sampler[int]):
    """Every prompt once per pass, in an order that is a function of the seed and the number of the pass.

    TRL's own sampler draws each pass from one running generator, so a resumed run starts again with the first pass's
    order. Here the pass is computed from the optimizer steps taken, so a resumed run continues.

    As TRL's dataloader expects, the indices of an iteration are repeated for each of its micro-batches. Prompts that
    do not fill a last iteration of a pass are left for the next one.

    Args:
        size: number of prompts.
        episodes: prompts of one iteration, over all processes.
        repeats: micro-batches of one iteration on one process, times inner epochs.
        steps: optimizer steps of one iteration.
        seed: of the order.
        shuffle: False keeps the order of the dataset.
        step: gives the optimizer steps taken so far.
    """

    def __init__(
        self, size: int, episodes: int, repeats: int, steps: int, seed: int, shuffle: bool, step: Callable[[], int]
    ) -> None:
        self.size = size
        self.episodes = episodes
        self.repeats = repeats
        self.steps = steps
        self.seed = seed
        self.shuffle = shuffle
        self.step = step

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
