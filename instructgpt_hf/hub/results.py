"""From the recorded metrics to the rows a reader sees and the values the Hub indexes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from instructgpt_hf.artifacts import StageArtifact

# name in stage.json: (label, how it is printed). Order is the order of the table; {} stands for a number in the name.
LABELS: dict[str, tuple[str, str]] = {
    "eval_loss": ("Loss on held-out demonstrations (nats per token)", "number"),
    "eval_perplexity": ("Perplexity on held-out demonstrations", "number"),
    "eval_mean_token_accuracy": ("Token accuracy on held-out demonstrations", "share"),
    "eval_pretraining_loss": ("Loss on pretraining text (nats per token)", "number"),
    "eval_accuracy": ("Pairwise accuracy on held-out rankings", "share"),
    "length_baseline_accuracy": ("Pairwise accuracy of preferring the longer completion", "share"),
    "above_length_baseline": ("Difference of these two accuracies", "share"),
    "labeler_agreement": ("Pairs that two labelers order alike", "share"),
    "eval_accuracy_k{}": ("Pairwise accuracy where a prompt has {} completions", "share"),
    "eval_accuracy_gap{}": ("Pairwise accuracy of completions {} apart in rank", "share"),
    "eval_kendall_tau": ("Kendall's tau-b of scores and ranks, mean over prompts", "number"),
    "length_baseline_kendall_tau": ("Kendall's tau-b of lengths and ranks, mean over prompts", "number"),
    "eval_ece": ("Expected calibration error", "share"),
    "eval_ece_by_chance": ("Calibration error that chance gives a calibrated model", "share"),
    "eval_overconfidence": ("Mean confidence above accuracy", "share"),
    "longer_scores_higher": ("Pairs in which the longer completion has the higher score", "share"),
    "longer_ranks_higher": ("The same pairs: the longer completion has the better rank", "share"),
    "score_length_correlation": ("Spearman's correlation of score and length, mean over prompts", "number"),
    "rank_length_correlation": ("Spearman's correlation of rank and length (better is higher)", "number"),
    "eval_pairs": ("Strictly ordered pairs in that measurement", "count"),
    "eval_prompts": ("Prompts in that measurement", "count"),
    "tied_pairs": ("Pairs left out because they tie", "count"),
    "equal_scores": ("Pairs to which the model gives equal scores", "count"),
    "demonstrations_scored": ("Demonstrations whose mean score is the shift", "count"),
    "reward_mean_on_demonstrations": ("Mean shifted reward of the demonstrations", "number"),
    "win_rate_vs_sft": ("Win rate against the SFT model", "share"),
    "judge": ("Judge of the win rate", "text"),
    "gold_score": ("Mean score by the judge", "number"),
    "mean_reward": ("Mean reward", "number"),
    "objective/scores": ("Mean reward of the last rollouts", "number"),
    "kl_to_sft": ("KL to the SFT model (nats per answer)", "number"),
    "objective/kl": ("KL to the SFT model in the last rollouts (nats per answer)", "number"),
    "task_accuracy": ("Accuracy on the pretraining tasks", "share"),
    "pretraining_loss": ("Loss on held-back pretraining text (nats per token)", "number"),
    "eos_rate": ("Answers that end", "share"),
    "mean_length": ("Mean length of the answers (tokens)", "number"),
    "completions/eos_rate": ("Answers of the last rollouts that end", "share"),
}

# The same name means another thing in another stage.
_STAGE_LABELS = {("reward", "eval_loss"): "Pairwise loss on held-out rankings"}

# Per stage: name in stage.json, metric type, dataset role it was measured on; only these reach the Hub's index.
_POLICY_INDEX = (
    ("win_rate_vs_sft", "win_rate", "prompts"),
    ("mean_reward", "mean_reward", "prompts"),
    ("kl_to_sft", "kl", "prompts"),
    ("task_accuracy", "accuracy", "pretraining"),
)
_INDEXED: dict[str, tuple[tuple[str, str, str], ...]] = {
    "sft": (("eval_loss", "loss", "demonstrations"),),
    "reward": (("eval_accuracy", "accuracy", "rankings"),),
    "ppo": _POLICY_INDEX,
    "ppo-ptx": _POLICY_INDEX,
}


@dataclass(frozen=True)
class Row:
    """One line of a results table, already formatted."""

    label: str
    value: str


def plain_number(value: Any) -> float | int | None:
    """A Python number, from a numpy or torch scalar too; None for anything else and for what is not finite."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def result_rows(metrics: dict[str, Any], stage: str) -> tuple[list[Row], list[Row]]:
    """Rows of the known metrics in the order of `LABELS`, and of the others by name; unknown values make no row."""
    known, shown = [], set()
    for entry, (label, kind) in LABELS.items():
        for name, number in _numbered(metrics, entry):
            shown.add(name)
            row = _row(metrics, name, _STAGE_LABELS.get((stage, name), label).format(number), kind)
            if row is not None:
                known.append(row)
    bounds = {name + end for name in metrics for end in ("_low", "_high") if name + end in metrics}
    rest = sorted(set(metrics) - shown - bounds)
    other = [row for name in rest if (row := _row(metrics, name, f"`{name}`", "number")) is not None]
    return known, other


def _numbered(metrics: dict[str, Any], entry: str) -> list[tuple[str, int]]:
    """The names that an entry of `LABELS` stands for, with their number, in the order of the numbers."""
    if "{}" not in entry:
        return [(entry, 0)]
    pattern = re.compile(entry.replace("{}", r"(\d+)"))
    return sorted(
        ((name, int(found[1])) for name in metrics if (found := pattern.fullmatch(name))), key=lambda x: x[1]
    )


def _row(metrics: dict[str, Any], name: str, label: str, kind: str) -> Row | None:
    value = metrics.get(name)
    if kind == "text" or isinstance(value, str):
        return Row(label, value) if isinstance(value, str) and value else None
    number = plain_number(value)
    if number is None:
        return None
    text = format_number(number, kind)
    low, high = (plain_number(metrics.get(name + end)) for end in ("_low", "_high"))
    if low is not None and high is not None:
        text += f" (95 % interval {format_number(low, kind)} to {format_number(high, kind)})"
    return Row(label, text)


def format_number(value: float | int, kind: str = "number") -> str:
    """`value` as a share in percent, a count with thousands separators, or four significant digits."""
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "count" or isinstance(value, int):
        return f"{round(value):,}"
    return f"{value:.4g}"


def index_entries(artifact: StageArtifact) -> list[Any]:
    """The `huggingface_hub.EvalResult` entries of the metrics whose dataset the stage recorded."""
    from huggingface_hub import EvalResult

    task = "text-classification" if artifact.stage == "reward" else "text-generation"
    entries = []
    for name, metric, role in _INDEXED[artifact.stage]:
        value = plain_number(artifact.metrics.get(name))
        held_back = artifact.data.get(f"{role}_test")
        data = held_back or artifact.data.get(role)
        if value is None or not data or not data.get("source"):
            continue
        entries.append(
            EvalResult(
                task_type=task,
                dataset_type=data["source"].removeprefix("./"),
                dataset_name=data["source"].removeprefix("./"),
                dataset_split=held_back.get("split") if held_back else None,
                metric_type=metric,
                metric_name=LABELS[name][0],
                metric_value=float(value),
            )
        )
    return entries
