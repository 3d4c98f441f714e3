"""`evaluate.Metric` modules of this package. They need no download and keep their inputs in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.intervals import RESAMPLES, wilson
from instructgpt_hf.evaluation.reward_model import measures as measures
from instructgpt_hf.evaluation.reward_model.length_bias import length_bias
from instructgpt_hf.evaluation.reward_model.pairs import Rankings

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


class _RankingMetric(_InMemoryMetric):
    """A measure of scores against rankings.

    `compute(predictions=..., references=..., lengths=None, seed=0, resamples=2000)` takes the scores of each prompt's
    completions, their ranks (1 is best, equal ranks are a tie) and, where given, their lengths in tokens. Intervals
    (`_low`, `_high`) are 95 % bootstrap intervals over prompts, because the pairs of one prompt are not independent;
    where all prompts agree, Wilson's interval on their number.
    """

    summary = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation=_CITATION,
            inputs_description=(
                "predictions: scores of each prompt's completions; references: their ranks, 1 is best, ties equal; "
                "lengths (optional): their lengths in tokens."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
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
    ) -> dict[str, Any]:
        return self._measure(Rankings.read(self.name, predictions, references, lengths), seed, resamples)

    def _measure(self, table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
        raise NotImplementedError


class PairwiseAccuracy(_RankingMetric):
    """Share of strictly ordered pairs of completions that a reward model orders as the labelers did.

    Returns what `instructgpt_hf.evaluation.reward_model.measures.accuracy` does: `accuracy`, the counts of pairs and
    prompts, ties apart, and with lengths `length_baseline_accuracy` and `above_length_baseline`.
    """

    summary = "Pairwise accuracy of a reward model on K ranked completions per prompt."

    def _measure(self, table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
        return measures.accuracy(table, seed, resamples)


class AccuracyBreakdown(_RankingMetric):
    """Pairwise accuracy by the number of completions (`by_completions`) and by the distance in rank (`by_gap`)."""

    summary = "Pairwise accuracy of a reward model by the prompt's number of completions and by the pair's rank gap."

    def _measure(self, table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
        by_size = measures.accuracy_by_size(table, seed, resamples)
        return {"by_completions": by_size, "by_gap": measures.accuracy_by_gap(table, seed, resamples)}


class Calibration(_RankingMetric):
    """Expected calibration error of sigmoid(score difference) and its reliability curve (`bins`)."""

    summary = "Calibration of a reward model's pair probabilities, the sigmoid of the score difference."

    def _measure(self, table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
        return measures.calibration(table, seed=seed, resamples=resamples)


class KendallTau(_RankingMetric):
    """Kendall's tau-b between scores and ranks, averaged over prompts; with lengths also that of the lengths."""

    summary = "Kendall's tau-b of a reward model's scores with the ranks, averaged over prompts."

    def _measure(self, table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
        return measures.kendall_tau(table, seed, resamples)


class LengthBias(_RankingMetric):
    """How much scores follow length, beside how much the ranks do; `lengths` must be given."""

    summary = "Dependence of a reward model's scores on length, beside that of the ranks."

    def _measure(self, table: Rankings, seed: int, resamples: int) -> dict[str, Any]:
        if table.lengths is None:
            raise InstructGPTError("length bias: pass the completions' lengths in tokens as `lengths`.")
        return length_bias(table, seed, resamples)


class LabelerAgreement(_InMemoryMetric):
    """Share of pairs that two labelers order alike, over the pairs that both ranked strictly.

    `compute(predictions=..., references=..., prompts=None, seed=0, resamples=2000)` takes two labelers' ranks of the
    same completions, one row per prompt and pair of labelers, and returns `agreement` with `agreement_low` and
    `agreement_high` (95 % bootstrap interval over prompts), `pairs`, `tied_pairs` (tied by at least one of the two)
    and `prompts`. `prompts` names each row's prompt where several pairs of labelers ranked one; otherwise every row
    is a prompt of its own.
    """

    def _info(self) -> evaluate.MetricInfo:
        ranks = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Agreement of two labelers on the order of pairs of completions.",
            citation=_CITATION,
            inputs_description="predictions: one labeler's ranks by prompt; references: another's, same completions.",
            features=datasets.Features({"predictions": ranks, "references": ranks}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        prompts: Sequence[Any] | None = None,
        seed: int = 0,
        resamples: int = RESAMPLES,
    ) -> dict[str, Any]:
        found = measures.agreement(predictions, references, prompts, seed, resamples)
        if found is None:
            raise InstructGPTError("labeler agreement: no pair of completions is ranked strictly by two labelers.")
        return found


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
        return {
            **measures.named("win_rate", estimate),
            "wins": wins,
            "ties": ties,
            "losses": losses,
            "prompts": len(pairs),
        }
