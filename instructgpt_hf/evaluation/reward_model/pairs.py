"""Scored rankings as flat arrays with all pairs: the input of every measure of a reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.intervals import RESAMPLES, Estimate, bounded_ratio


@dataclass(frozen=True)
class Rankings:
    """N scored rankings with M completions and Q pairs of completions of one prompt.

    Memory grows with Q, the sum of K(K-1)/2 over the prompts, and never with M squared.

    Attributes:
        sizes: [N], the number K of completions of every prompt.
        prompt: [Q], the prompt of every pair.
        better: [Q], the completion (index into the M) with the better rank; in a tied pair the first.
        worse: [Q], the other one.
        gap: [Q], the difference of their dense ranks, which number the distinct ranks of a prompt: 0 for a tied pair,
            1 for neighbours, whatever the numbers of the ranks.
        scores: [M], of the reward model.
        lengths: [M], in tokens, or None.
        seed: of the bootstrap over prompts that all intervals come from.
        resamples: of this bootstrap.
    """

    sizes: np.ndarray
    prompt: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    gap: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray | None
    seed: int
    resamples: int

    @classmethod
    def read(
        cls,
        what: str,
        scores: Sequence[Sequence[float]],
        ranks: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
        resamples: int = RESAMPLES,
    ) -> Rankings:
        """Check and flatten [N][K] lists; in `ranks` 1 is best and equal ranks are a tie.

        Args:
            what: the measure's name, with which error messages begin.

        Raises:
            InstructGPTError: if the lists differ in shape, a value is not a finite number, or no prompt has two
                completions of different rank.
        """
        columns = {"scores": scores, "ranks": ranks} | ({} if lengths is None else {"lengths": lengths})
        _check(what, columns)
        sizes = np.array([len(row) for row in ranks], dtype=np.int64)
        flat = {
            name: np.array([value for row in column for value in row], dtype=float) for name, column in columns.items()
        }
        prompt, first, second = _all_pairs(sizes)
        dense = _dense_ranks(flat["ranks"], np.repeat(np.arange(len(sizes)), sizes))
        difference = dense[second] - dense[first]
        better, worse = np.where(difference < 0, (second, first), (first, second))
        table = cls(
            sizes=sizes,
            prompt=prompt,
            better=better,
            worse=worse,
            gap=np.abs(difference),
            scores=flat["scores"],
            lengths=flat.get("lengths"),
            seed=seed,
            resamples=resamples,
        )
        if not table.strict.any():
            raise InstructGPTError(f"{what}: none of {len(ranks)} prompts has two completions of different rank.")
        return table

    @property
    def strict(self) -> np.ndarray:
        """Bool [Q]: the pairs that are not tied."""
        return self.gap > 0

    def differences(self, values: np.ndarray) -> np.ndarray:
        """[Q]: the better completion's value minus the worse one's, from values [M]."""
        return values[self.better] - values[self.worse]

    def points(self, values: np.ndarray) -> np.ndarray:
        """[Q]: 1 where the better completion has the higher of the values [M], 1/2 where they are equal, else 0."""
        return (np.sign(self.differences(values)) + 1) / 2

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[N]: for every prompt the sum of a [Q] array over its pairs."""
        return np.bincount(self.prompt, weights=values, minlength=len(self.sizes))

    def pair_mean(self, values: np.ndarray, chosen: np.ndarray, lowest: float = 0.0) -> Estimate:
        """Mean of `values` [Q], each between `lowest` and 1, over the pairs in `chosen` (bool [Q])."""
        return bounded_ratio(self.sums(values * chosen), self.sums(chosen), lowest, self.seed, self.resamples)

    def prompt_mean(self, correlations: np.ndarray, chosen: np.ndarray) -> Estimate:
        """Mean of `correlations` [N], each between -1 and 1, over the prompts in `chosen` (bool [N])."""
        return bounded_ratio(correlations * chosen, chosen.astype(float), -1.0, self.seed, self.resamples)


def _all_pairs(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt, first and second completion of every pair, sorted by prompt."""
    starts = np.cumsum(sizes) - sizes
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        first, second = np.triu_indices(size, 1)
        offsets = starts[rows][:, None]
        parts.append((np.repeat(rows, len(first)), (offsets + first[None]).ravel(), (offsets + second[None]).ravel()))
    prompt, first, second = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(prompt, kind="stable")
    return prompt[order], first[order], second[order]


def _dense_ranks(ranks: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """[M]: consecutive numbers for the distinct ranks of a prompt: 1, 3, 3, 7 become n, n + 1, n + 1, n + 2."""
    order = np.lexsort((ranks, prompt))
    dense = np.empty(len(ranks), dtype=np.int64)
    dense[order] = np.concatenate([[0], np.cumsum(np.diff(ranks[order]) != 0)])
    return dense


def _check(what: str, columns: dict[str, Sequence[Sequence[float]]]) -> None:
    ranks = columns["ranks"]
    if not len(ranks):
        raise InstructGPTError(f"{what}: there are no rankings.")
    for name, column in columns.items():
        if len(column) != len(ranks):
            raise InstructGPTError(f"{what}: {len(column)} {name} for {len(ranks)} rankings.")
        for row, (values, expected) in enumerate(zip(column, ranks, strict=True)):
            if len(values) != len(expected):
                raise InstructGPTError(f"{what}: row {row} has {len(values)} {name} for {len(expected)} ranks.")
            if not all(math.isfinite(value) for value in values):
                raise InstructGPTError(f"{what}: row {row} of {name} holds a value that is not a finite number.")
