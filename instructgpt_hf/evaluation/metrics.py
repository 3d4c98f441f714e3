"""`evaluate.Metric` modules of this package. They need no download and keep their inputs in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.intervals import RESAMPLES, Estimate, bootstrap_ratio, wilson
from instructgpt_hf.functional import pair_counts, pairwise_accuracy

_CITATION = """\
@inproceedings{ouyang2022training,
    title     = {Training language models to follow instructions with human feedback},
    author    = {Long Ouyang and others},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = 2022
}"""


class _InMemoryMetric(evaluate.Metric):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)


class PairwiseAccuracy(_InMemoryMetric):
    """Share of strictly ordered pairs of completions that a reward model orders as the labelers did.

    `compute(predictions=..., references=..., lengths=None, seed=0, resamples=2000)` returns

    - `accuracy`: over all strict pairs of all prompts; equal scores count one half;
    - `accuracy_low`, `accuracy_high`: 95 % bootstrap interval over prompts, because the pairs of one prompt are not
      independent; where every prompt agrees (accuracy 0 or 1) Wilson's interval on the number of prompts;
    - `pairs`, `tied_pairs`, `prompts`: how many were counted, left out because the labelers tied, and used;
    - `equal_scores`: pairs among `pairs` whose scores are equal;
    - with `lengths`: `length_baseline_accuracy` (`_low`, `_high`), the accuracy of predicting that the longer
      completion is the better one, and `above_length_baseline`, the difference of the two.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pairwise accuracy of a reward model on K ranked completions per prompt.",
            citation=_CITATION,
            inputs_description=(
                "predictions: scores of each prompt's completions; references: their ranks, 1 is best, ties equal; "
                "lengths (optional): their lengths in tokens."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
        resamples: int = RESAMPLES,
    ) -> dict[str, float]:
        _check_rows(predictions, references, lengths)
        ranks = torch.tensor([rank for row in references for rank in row], dtype=torch.long)
        groups = torch.tensor([index for index, row in enumerate(references) for _ in row], dtype=torch.long)
        scores = torch.tensor([score for row in predictions for score in row], dtype=torch.float32)
        counts = pair_counts(ranks, groups)
        if not counts.sum():
            raise InstructGPTError(
                f"pairwise accuracy: none of {len(references)} prompts has two completions of different rank."
            )
        better = _accuracy(scores, ranks, groups, seed, resamples)
        in_group, ranked = groups[:, None] == groups[None, :], ranks[:, None] < ranks[None, :]
        equal = in_group & ranked & (scores[:, None] == scores[None, :])
        all_pairs = sum(len(row) * (len(row) - 1) // 2 for row in references)
        result = {
            **_named("accuracy", better),
            "pairs": int(counts.sum()),
            "tied_pairs": all_pairs - int(counts.sum()),
            "prompts": int((counts > 0).sum()),
            "equal_scores": int(equal.sum()),
        }
        if lengths is not None:
            tokens = torch.tensor([length for row in lengths for length in row], dtype=torch.float32)
            longer = _accuracy(tokens, ranks, groups, seed, resamples)
            result |= _named("length_baseline_accuracy", longer)
            result["above_length_baseline"] = better.value - longer.value
        return result


class WinRate(_InMemoryMetric):
    """How often one policy's answer scores above another's to the same prompt.

    `compute(predictions=..., references=...)` takes one score per prompt for the policy and for its opponent, from a
    judge or a labeler, and returns `win_rate` (a tie is half a win) with `win_rate_low` and `win_rate_high`, Wilson's
    95 % interval over prompts, and the counts `wins`, `ties`, `losses`, `prompts`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of prompts on which the first policy's answer has the higher score; ties count half.",
            citation=_CITATION,
            inputs_description="predictions: score of the policy's answer by prompt; references: of the opponent's.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
        losses = sum(a < b for a, b in pairs)
        if wins + ties + losses < len(pairs) or not pairs:
            raise InstructGPTError(f"win rate: {len(pairs)} prompts, some with a score that is not a number.")
        estimate = wilson(wins + 0.5 * ties, len(pairs))
        return {**_named("win_rate", estimate), "wins": wins, "ties": ties, "losses": losses, "prompts": len(pairs)}


def _accuracy(scores: torch.Tensor, ranks: torch.Tensor, groups: torch.Tensor, seed: int, resamples: int) -> Estimate:
    correct, counts = pairwise_accuracy(scores, ranks, groups)
    used = counts > 0
    estimate = bootstrap_ratio(correct[used].numpy(), counts[used].numpy(), seed, resamples)
    if estimate.value in (0.0, 1.0):
        prompts = int(used.sum())
        return wilson(estimate.value * prompts, prompts)
    return estimate


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _check_rows(*columns: Sequence[Sequence[Any]] | None) -> None:
    """Raise unless every column has a number for every completion of every prompt."""
    predictions, references, lengths = columns
    for name, column in (("predictions", predictions), ("lengths", lengths)):
        if column is None:
            continue
        if len(column) != len(references or ()):
            raise InstructGPTError(f"pairwise accuracy: {len(column)} {name} for {len(references or ())} references.")
        for row, (found, ranks) in enumerate(zip(column, references or (), strict=True)):
            if len(found) != len(ranks):
                raise InstructGPTError(
                    f"pairwise accuracy: row {row} has {len(found)} {name} for {len(ranks)} references."
                )
            if any(value != value for value in found):
                raise InstructGPTError(f"pairwise accuracy: row {row} of {name} holds a value that is not a number.")
