"""Evaluation of reward models and policies. Names, and the libraries they need, are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_METRICS = "AccuracyBreakdown Calibration KendallTau LabelerAgreement LengthBias PairwiseAccuracy WinRate"
_MODULES = {
    "intervals": "Estimate bootstrap_mean paired_difference wilson",
    "likelihood": "continuation_log_probs option_accuracy sequence_kl text_loss",
    "metrics": _METRICS,
    "report": "print_table write_report",
    "results": "PolicyRow",
    "reward_model.evaluate": "evaluate_rankings flat_metrics labeler_agreement",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
