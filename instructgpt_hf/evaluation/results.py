"""Results of one policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from instructgpt_hf.evaluation.intervals import Estimate
from instructgpt_hf.metric_register import stage_metrics


@dataclass
class PolicyRow:
    """Results of one policy; None for what was not measured. The report's columns have the order of the attributes.

    Attributes:
        name: as the reader knows it: `base`, `SFT`, `PPO`, `PPO-ptx`.
        win_rate: against the SFT model, by the judge; ties count half.
        task_accuracy: on the pretraining tasks.
        kl: to the SFT model, nats per completion.
        mean_reward: of the reward model, shifted.
        gold_score: mean score of the lab's gold labeler.
        task_accuracy_by_task: the same by task.
        extra: other numbers by name; report.json has all of them, stage.json the floats.
    """

    name: str
    win_rate: Estimate | None = None
    task_accuracy: Estimate | None = None
    kl: Estimate | None = None
    mean_reward: Estimate | float | None = None
    gold_score: Estimate | float | None = None
    task_accuracy_by_task: dict[str, Estimate] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """All results under their names in stage.json, which the cards read; intervals as `_low` and `_high`."""
        flat: dict[str, float] = {}
        for metric in stage_metrics("ppo"):
            value = getattr(self, metric.attribute) if metric.attribute else None
            if isinstance(value, Estimate):
                flat |= value.entries(metric.name)
            elif value is not None:
                flat[metric.name] = float(value)
        return flat | {name: value for name, value in self.extra.items() if isinstance(value, float)}
