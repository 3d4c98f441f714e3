"""Evaluation of reward models and policies. Names, and the libraries they need, are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "AccuracyBreakdown": "metrics",
    "Calibration": "metrics",
    "Estimate": "intervals",
    "KendallTau": "metrics",
    "LabelerAgreement": "metrics",
    "LengthBias": "metrics",
    "PairwiseAccuracy": "metrics",
    "PolicyRow": "results",
    "WinRate": "metrics",
    "bootstrap_mean": "intervals",
    "continuation_log_probs": "likelihood",
    "evaluate_rankings": "reward_model.evaluate",
    "flat_metrics": "reward_model.evaluate",
    "labeler_agreement": "reward_model.evaluate",
    "option_accuracy": "likelihood",
    "paired_difference": "intervals",
    "print_table": "report",
    "sequence_kl": "likelihood",
    "text_loss": "likelihood",
    "wilson": "intervals",
    "write_report": "report",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
