"""The order in which prompts are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


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
