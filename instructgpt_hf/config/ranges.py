"""Ranges of settings. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a setting may take: a test, and the rule for the user."""

    holds: Callable[[Any], bool]
    rule: str


ONE = Range(lambda value: value == 1, "must be 1, the baseline is the value model")
POSITIVE = Range(lambda value: value > 0, "must be greater than 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must be 0 or greater")
AT_LEAST_ONE = Range(lambda value: value >= 1, "must be 1 or greater")
AT_LEAST_TWO = Range(lambda value: value >= 2, "must be 2 or greater")
FRACTION = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
POSITIVE_SHARE = Range(lambda value: 0 < value <= 1, "must be greater than 0 and at most 1")
UNIT = Range(lambda value: 0 <= value <= 1, "must be between 0 and 1")
LIMIT = Range(lambda value: value == -1 or value >= 1, "must be 1 or greater, or -1 for no limit")
