"""Everything that is measured of a reward model on held-out rankings, as one result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instructgpt_hf.evaluation.reward_model.length_bias import length_bias
from instructgpt_hf.evaluation.reward_model.measures import (
    accuracy,
    accuracy_by_gap,
    accuracy_by_size,
    agreement,
    calibration,
    kendall_tau,
    score_gaps,
)
from instructgpt_hf.evaluation.reward_model.pairs import Rankings


def evaluate_rankings(
    scores: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]],
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the scores of a reward model against rankings.

    Args:
        scores: [N][K], one list per prompt; a constant added to all of them changes nothing.
        ranks: [N][K], 1 is best, equal ranks are a tie.
        lengths: [N][K], of the completions in tokens, without the prompt and with EOS.
        seed: of the bootstraps.

    Returns:
        What JSON can hold, by measure: `accuracy`, `by_completions`, `by_gap`, `calibration`, `kendall_tau`, `length`
        and `score_gaps`; the function of each measure in `instructgpt_hf.evaluation.reward_model.measures` names its
        entries (`length_bias` has a module of its own).

    Raises:
        InstructGPTError: if the lists differ in shape, a value is not a finite number, or no prompt has two
            completions of different rank.
    """
    table = Rankings.read("evaluation of the reward model", scores, ranks, lengths)
    return {
        "accuracy": accuracy(table, seed),
        "by_completions": accuracy_by_size(table, seed),
        "by_gap": accuracy_by_gap(table, seed),
        "calibration": calibration(table, seed=seed),
        "kendall_tau": kendall_tau(table, seed),
        "length": length_bias(table, seed),
        "score_gaps": score_gaps(table),
    }


# Measure and entry in the result, and the name in logs and in stage.json; entries with an interval keep it.
_FLAT = (
    ("accuracy", "accuracy", "eval_accuracy"),
    ("accuracy", "pairs", "eval_pairs"),
    ("accuracy", "prompts", "eval_prompts"),
    ("accuracy", "tied_pairs", "tied_pairs"),
    ("accuracy", "equal_scores", "equal_scores"),
    ("accuracy", "length_baseline_accuracy", "length_baseline_accuracy"),
    ("accuracy", "above_length_baseline", "above_length_baseline"),
    ("calibration", "ece", "eval_ece"),
    ("calibration", "ece_by_chance", "eval_ece_by_chance"),
    ("calibration", "overconfidence", "eval_overconfidence"),
    ("kendall_tau", "kendall_tau", "eval_kendall_tau"),
    ("kendall_tau", "length_baseline_kendall_tau", "length_baseline_kendall_tau"),
    ("length", "score_length_correlation", "score_length_correlation"),
    ("length", "rank_length_correlation", "rank_length_correlation"),
    ("length", "longer_scores_higher", "longer_scores_higher"),
    ("length", "longer_ranks_higher", "longer_ranks_higher"),
    ("labelers", "agreement", "labeler_agreement"),
)


def flat_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `evaluate_rankings` under the names of logs and stage.json; what is None is left out.

    A result to which `labeler_agreement`'s was added as `labelers` also has `labeler_agreement`.

    Accuracy by K and by rank gap are `eval_accuracy_k4` and `eval_accuracy_gap1`, without their intervals, which are
    in the nested result.
    """
    flat: dict[str, float] = {}
    for measure, entry, name in _FLAT:
        found = result.get(measure) or {}
        for end in ("", "_low", "_high"):
            if found.get(entry + end) is not None:
                flat[name + end] = found[entry + end]
    for row in result["by_completions"]:
        flat[f"eval_accuracy_k{row['completions']}"] = row["accuracy"]
    for row in result["by_gap"]:
        flat[f"eval_accuracy_gap{row['gap']}"] = row["accuracy"]
    return flat


def labeler_agreement(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Any] | None:
    """How often two labelers order two completions of a prompt alike, from rankings that name their labelers.

    Two rankings of one prompt by different labelers are compared on the completions that occur in both, pair by pair.

    Args:
        rows: `prompt`, `completions`, `ranks` and `labeler`.
        seed: of the bootstrap.

    Returns:
        `agreement` (with its interval over prompts), `pairs`, `tied_pairs` and `prompts` as of `measures.agreement`,
        and `labelers`, how many there are; None if the rows name no labelers or no pair was ranked strictly by two.
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
    found = agreement(first, second, prompts, seed)
    if found is None:
        return None
    return {**found, "labelers": len({labeler for rankings in by_prompt.values() for labeler, _ in rankings})}
