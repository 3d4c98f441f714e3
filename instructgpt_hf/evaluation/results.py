"""What was measured of a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from instructgpt_hf.evaluation.intervals import Estimate


@dataclass
class PolicyRow:
    """What was measured of one policy; None where something was not.

    Attributes:
        name: as the reader knows it: `base`, `SFT`, `PPO`, `PPO-ptx`.
        win_rate: against the SFT model, by the judge; ties count half.
        task_accuracy: on the pretraining tasks.
        kl: to the SFT model, nats per answer.
        mean_reward: of the reward model, shifted.
        gold_score: mean score of the judge.
        task_accuracy_by_task: the same by task.
        extra: other numbers by name, written to report.json only.
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
        """The measurements as the flat names of stage.json, which the cards read; intervals as `_low` and `_high`."""
        names = {
            "win_rate_vs_sft": self.win_rate,
            "task_accuracy": self.task_accuracy,
            "kl_to_sft": self.kl,
            "mean_reward": self.mean_reward,
            "gold_score": self.gold_score,
        }
        flat: dict[str, float] = {}
        for name, value in names.items():
            if isinstance(value, Estimate):
                flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            elif value is not None:
                flat[name] = float(value)
        return flat
