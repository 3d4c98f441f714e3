"""Values are checked against the type annotations, and nothing is rounded or guessed."""

# ruff: noqa: UP007, UP045  TRL and transformers write unions both ways.

from enum import Enum
from typing import Any, Literal, Optional, Union

import pytest
import yaml

from instructgpt_hf.config.parsing import Mismatch, coerce


class Kind(str, Enum):  # noqa: UP042 - a field may hold either kind
    FAST = "fast"
    SLOW = "slow"


def test_yaml_reads_an_exponent_as_text_and_we_as_a_number():
    value = yaml.safe_load("lr: 2e-5")["lr"]
    assert value == "2e-5"
    assert coerce(value, float) == 2e-5


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        (256_000, int, 256_000),
        (2.56e5, int, 256_000),
        ("1e3", int, 1000),
        (True, bool, True),
        (None, int | None, None),
        ("auto", int | str | None, "auto"),
        (8, Union[int, str, None], 8),
        ("fast", Kind | str, "fast"),
        (["a", "b"], str | list[str] | None, ["a", "b"]),
        ("all-linear", str | list[str] | None, "all-linear"),
        ([0, 1], tuple[float, float] | None, (0.0, 1.0)),
        ({"min_lr_rate": "1e-1"}, dict[str, Any] | str | None, {"min_lr_rate": 0.1}),
        ({"name": "1.0"}, dict, {"name": "1.0"}),
        (False, Union[str, None, Literal[False]], False),
        ("x", Optional[str], "x"),
    ],
)
def test_yaml_values_that_fit(value, hint, expected):
    result = coerce(value, hint)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "rule"),
    [
        (2.5, int, "a whole number"),
        ("fast", float, "a number"),
        ("true", bool, "true or false"),
        (1, bool, "true or false"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (float("nan"), float, "a number"),
        ("inf", float, "a number"),
        (None, int, "a whole number, and it is empty"),
        (3, str, "text"),
        ("fats", Kind | str, "did you mean 'fast'?"),
        (["a", 3], list[str], "a list"),
        ([1.0], tuple[float, float], "a list"),
        ("text", dict, "a mapping"),
        ({1: 2}, dict[str, Any], "a mapping"),
    ],
)
def test_yaml_values_that_do_not_fit(value, hint, rule):
    with pytest.raises(Mismatch) as caught:
        coerce(value, hint)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        ("-1", float, -1.0),
        ("true", bool, True),
        ("False", bool | None, False),
        ("null", float | None, None),
        ("None", str | None, None),
        ("3", str, "3"),
        (["q_proj", "v_proj"], str | list[str] | None, ["q_proj", "v_proj"]),
        ("q_proj,v_proj", list[str], ["q_proj", "v_proj"]),
        ("q_proj,v_proj", str | list[str] | None, ["q_proj", "v_proj"]),
        ("all-linear", str | list[str] | None, "all-linear"),
        ("q_proj", list[str], ["q_proj"]),
        ("8", int | str | None, 8),
        ('["q_proj"]', list[str], ["q_proj"]),
        ('{"min_lr_rate": 0.2}', dict[str, Any] | str | None, {"min_lr_rate": 0.2}),
    ],
)
def test_words_of_the_command_line(value, hint, expected):
    result = coerce(value, hint, from_shell=True)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(("value", "hint"), [("2.5", int), ("maybe", bool), (["1", "2"], float), ("{bad", dict)])
def test_words_that_do_not_fit(value, hint):
    with pytest.raises(Mismatch):
        coerce(value, hint, from_shell=True)
