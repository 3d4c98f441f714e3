"""The metric register: names without doubt, and every place that shows metrics finds them there."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest
from helpers.metrics import find_metric

from instructgpt_hf.evaluation import PolicyRow
from instructgpt_hf.evaluation.plots.training_curves import _LINE_STYLE, _PANELS
from instructgpt_hf.metric_register import ALL, METRICS, stage_metrics, terminal_values


@pytest.mark.parametrize("stage", ALL)
def test_names_are_unique_within_a_stage(stage):
    counts = Counter(metric.name for metric in stage_metrics(stage))
    assert counts and max(counts.values()) == 1
    assert all(find_metric(metric.name.format(2), stage) is metric for metric in stage_metrics(stage))


def test_every_panel_has_lines_and_every_line_a_panel():
    titles = [panel.title for panel in _PANELS]
    assert {metric.panel for metric in METRICS if metric.panel} == set(titles)
    for panel in _PANELS:
        for stage, metric in panel.lines:
            assert metric.line in _LINE_STYLE or stage.startswith("ppo")


def test_columns_are_attributes_of_a_policy():
    names = {field.name for field in fields(PolicyRow)}
    assert {metric.attribute for metric in METRICS if metric.column} == {
        metric.attribute for metric in METRICS if metric.attribute
    }
    assert {metric.attribute for metric in METRICS if metric.attribute} < names


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        ("loss", "sft", "loss"),
        ("eval_entropy", "sft", "entropy"),
        ("eval_runtime", "sft", "train_runtime"),
        ("eval_accuracy_k4", "reward", "eval_accuracy_k{}"),
        ("eval_accuracy_gap10", "reward", "eval_accuracy_gap{}"),
        ("eval_accuracy_low", "reward", "eval_accuracy"),
        ("eval_length_baseline_accuracy_high", "reward", "length_baseline_accuracy"),
        ("rewards/my_function", "ppo", "rewards/<name>"),
    ],
)
def test_a_logged_name_leads_to_its_entry(name, stage, expected):
    metric = find_metric(name, stage)
    assert metric is not None and metric.name == expected and stage in metric.stages


@pytest.mark.parametrize(("name", "stage"), [("eval_accuracy_k", "reward"), ("objective/kl", "sft"), ("mine", "ppo")])
def test_an_unknown_name_has_no_entry(name, stage):
    assert find_metric(name, stage) is None


def test_numbered_names_tell_their_number():
    metric = find_metric("eval_accuracy_k4", "reward")
    assert (metric.number_in("eval_accuracy_k12"), metric.number_in("eval_accuracy")) == (12, None)
    assert find_metric("loss", "sft").number_in("loss") == 0


def test_the_terminal_shows_finite_numbers_in_order():
    logs = {"loss/ptx": 2.5, "objective/kl": 1.0, "loss": 0.25, "objective/scores": 3, "epoch": 1.0}
    assert terminal_values(logs) == ["loss 0.250", "KL 1.000", "ptx loss 2.500"]
