"""All measures of a reward model on held-out rankings, as one result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instructgpt_hf.evaluation.reward_model import measures
from instructgpt_hf.evaluation.reward_model.length_bias import length_bias
from instructgpt_hf.evaluation.reward_model.pairs import Rankings
from instructgpt_hf.metric_register import stage_metrics


def evaluate_rankings(
    scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], seed: int = 0
) -> dict[str, Any]:
    """Measure the scores of a reward model against rankings.

    Args:
        scores: [N][K], one list per prompt; a constant added to all of them changes nothing.
        ranks: [N][K], 1 is best, equal ranks are a tie.
        lengths: [N][K], of the completions in tokens, without the prompt and with EOS.

    Returns:
        JSON values by measure: `accuracy`, `by_completions`, `by_gap`, `calibration`, `kendall_tau`, `length` and
        `score_gaps`. The functions in `measures` and `length_bias` of this package document the entries of each.

    Raises:
        InstructGPTError: if the lists differ in shape, a value is not a finite number, or no prompt has two
            completions of different rank.
    """
    table = Rankings.read("evaluation of the reward model", scores, ranks, lengths, seed)
    return {
        "accuracy": measures.accuracy(table),
        **measures.breakdown(table),
        "calibration": measures.calibration(table),
        "kendall_tau": measures.kendall_tau(table),
        "length": length_bias(table),
        "score_gaps": measures.score_gaps(table),
    }


def flat_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `evaluate_rankings` under their names in logs and in stage.json; None is left out.

    `labeler_agreement` is among them if the result of that function was added as `labelers`. Accuracy by K and by rank
    gap (`eval_accuracy_k4`, `eval_accuracy_gap1`) comes without intervals, which are in the nested result.
    """
    flat: dict[str, float] = {}
    for metric in stage_metrics("reward"):
        part, _, entry = metric.measure.partition(".")
        values = result.get(part) or {}
        if isinstance(values, list):
            flat |= {metric.name.format(row[entry]): row["accuracy"] for row in values}
            continue
        entry = entry or metric.name.removeprefix("eval_")
        for end in ("", "_low", "_high"):
            if values.get(entry + end) is not None:
                flat[metric.name + end] = values[entry + end]
    return flat


def labeler_agreement(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Any] | None:
    """Share of pairs that two labelers order alike, from rankings that name their labelers.

    Two rankings of one prompt by different labelers are compared on the pairs of completions that occur in both.

    Args:
        rows: `prompt`, `completions`, `ranks` and `labeler`.

    Returns:
        The result of `measures.agreement` and the number of `labelers`; None if the rows name no labelers or no pair
        was ranked strictly by two of them.
    """
    by_prompt: dict[str, list[tuple[str, dict[str, int]]]] = {}
    for row in rows:
        if row.get("labeler") is not None:
            ranking = dict(zip(row["completions"], row["ranks"], strict=True))
            by_prompt.setdefault(json.dumps(row["prompt"]), []).append((row["labeler"], ranking))
    first, second, prompts = [], [], []
    for prompt, rankings in by_prompt.items():
        for (labeler, ranks), (other, others) in itertools.combinations(rankings, 2):
            common = [text for text in ranks if text in others]
            if labeler != other and len(common) > 1:
                first.append([ranks[text] for text in common])
                second.append([others[text] for text in common])
                prompts.append(prompt)
    result = measures.agreement(first, second, prompts, seed)
    labelers = {labeler for rankings in by_prompt.values() for labeler, _ in rankings}
    return None if result is None else {**result, "labelers": len(labelers)}
