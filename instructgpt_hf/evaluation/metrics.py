"""`evaluate.Metric` modules of this package. They need no download and keep their inputs in memory.

Intervals (`_low`, `_high`) are at 95 %: bootstrap intervals over prompts, because the pairs of one prompt are not
independent, and Wilson's on the number of prompts for the win rate and where all prompts agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation import intervals
from instructgpt_hf.evaluation.reward_model import measures
from instructgpt_hf.evaluation.reward_model.length_bias import length_bias
from instructgpt_hf.evaluation.reward_model.pairs import Rankings

_CITATION = """\
@inproceedings{ouyang2022training,
    title     = {Training language models to follow instructions with human feedback},
    author    = {Long Ouyang and others},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = 2022
}"""
_SCORE, _RANKS = datasets.Value("float64"), datasets.Sequence(datasets.Value("int64"))
_RANKINGS_INPUTS = (
    "predictions: a reward model's scores of each prompt's completions; references: their ranks, 1 is best, equal "
    "ranks are a tie; lengths (optional): the completions' lengths in tokens; seed and resamples of the bootstrap "
    "(optional)."
)


class _InMemoryMetric(evaluate.Metric):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)


def _metric(
    name: str, summary: str, inputs: str, prediction: Any, reference: Any, compute: Callable[..., dict[str, Any]]
) -> type[evaluate.Metric]:
    """A metric class around a function of predictions, references and options."""

    def _info(self: Any) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": prediction, "references": reference})
        texts = {"description": summary, "inputs_description": inputs, "citation": _CITATION}
        return evaluate.MetricInfo(features=features, **texts)

    def _compute(self: Any, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return compute(predictions, references, **options)

    texts = {"__doc__": f"{summary}\n\nInputs of `compute`: {inputs}", "__module__": __name__}
    return type(name, (_InMemoryMetric,), {**texts, "_info": _info, "_compute": _compute})


def _of_rankings(name: str, measure: Callable[[Rankings], dict[str, Any]]) -> type[evaluate.Metric]:
    """A metric class around a measure of scored rankings, with the measure's docstring as its description."""

    def compute(scores: Any, ranks: Any, **options: Any) -> dict[str, Any]:
        return measure(Rankings.read(name, scores, ranks, **options))

    summary = inspect.getdoc(measure) or ""
    return _metric(name, summary, _RANKINGS_INPUTS, datasets.Sequence(_SCORE), _RANKS, compute)


def _labeler_agreement(first: Any, second: Any, **options: Any) -> dict[str, Any]:
    result = measures.agreement(first, second, **options)
    if result is None:
        raise InstructGPTError("labeler agreement: no pair of completions is ranked strictly by two labelers.")
    return result


PairwiseAccuracy = _of_rankings("PairwiseAccuracy", measures.accuracy)
AccuracyBreakdown = _of_rankings("AccuracyBreakdown", measures.breakdown)
Calibration = _of_rankings("Calibration", measures.calibration)
KendallTau = _of_rankings("KendallTau", measures.kendall_tau)
LengthBias = _of_rankings("LengthBias", length_bias)
LabelerAgreement = _metric(
    "LabelerAgreement",
    "Share of the pairs ranked strictly by two labelers that both order alike: `agreement`, `pairs`, `tied_pairs` "
    "(tied by at least one of the two) and `prompts`.",
    "predictions: one labeler's ranks, one row per prompt and pair of labelers; references: another labeler's ranks "
    "of the same completions; prompts (optional): the prompt of each row, by default each row has its own; seed and "
    "resamples of the bootstrap (optional).",
    _RANKS,
    _RANKS,
    _labeler_agreement,
)
WinRate = _metric(
    "WinRate",
    "Share of prompts on which a policy's completion scores above another policy's; a tie is half a win: `win_rate`, "
    "and the counts `wins`, `ties`, `losses`, `prompts`.",
    "predictions: the score of the policy's completion by prompt, from a judge or a labeler; references: of the "
    "opponent's.",
    _SCORE,
    _SCORE,
    intervals.win_rate,
)
