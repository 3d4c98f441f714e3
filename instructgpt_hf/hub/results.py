"""From a stage's metrics to the card's table of results and to the results that the Hub indexes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from instructgpt_hf.artifacts import StageArtifact, to_json
from instructgpt_hf.metric_register import stage_metrics

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


class Row(NamedTuple):
    """One line of a results table, already formatted."""

    label: str
    value: str


def result_rows(metrics: dict[str, Any], stage: str) -> tuple[list[Row], list[Row]]:
    """Rows of the metrics with a label, in the order of the register, and of the others by name.

    Values that are neither text nor a finite number make no row.
    """
    values = to_json(metrics)
    labelled: dict[str, tuple[str, str]] = {}
    for metric in stage_metrics(stage):
        if not metric.label:
            continue
        numbers = [(number, name) for name in values if (number := metric.number_in(name)) is not None]
        for number, name in sorted(numbers):
            labelled[name] = metric.label.format(number), metric.kind
    bounds = {name + end for name in values for end in ("_low", "_high")}
    others = {name: (f"`{name}`", "number") for name in sorted(set(values) - set(labelled) - bounds)}
    return list(_rows(values, labelled)), list(_rows(values, others))


def _rows(values: dict[str, Any], shown: dict[str, tuple[str, str]]) -> Iterator[Row]:
    """The rows of the metrics `shown` by name, with their label and kind."""
    for name, (label, kind) in shown.items():
        value, low, high = (values.get(name + end) for end in ("", "_low", "_high"))
        if isinstance(value, str) and value:
            yield Row(label, value)
        elif kind != "text" and _is_number(value):
            interval = ""
            if _is_number(low) and _is_number(high):
                interval = f" (95 % interval {_format(low, kind)} to {_format(high, kind)})"
            yield Row(label, _format(value, kind) + interval)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _format(value: float | int, kind: str) -> str:
    """`value` as a share in percent, a count with thousands separators, or four significant digits."""
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "count" or isinstance(value, int):
        return f"{round(value):,}"
    return f"{value:.4g}"


def index_entries(artifact: StageArtifact) -> list[EvalResult]:
    """The Hub's entries of the stage's indexed metrics, as far as the stage recorded their dataset."""
    from huggingface_hub import EvalResult

    task = "text-classification" if artifact.stage == "reward" else "text-generation"
    entries = []
    for metric in stage_metrics(artifact.stage):
        metric_type, role = metric.index or ("", "")
        value = to_json(artifact.metrics.get(metric.name))
        held_back = artifact.data.get(f"{role}_test", {})
        source = (held_back or artifact.data.get(role, {})).get("source", "")
        if not metric.index or not _is_number(value) or not source:
            continue
        entries.append(
            EvalResult(
                task_type=task,
                # Without the colon, a folder's name would be the id of a dataset on the Hub.
                dataset_type=f"local:{source[2:]}" if source.startswith("./") else source,
                dataset_name=source.removeprefix("./"),
                dataset_split=held_back.get("split"),
                metric_type=metric_type,
                metric_name=metric.label,
                metric_value=float(value),
            )
        )
    return entries
