"""Reward functions of the user: the columns they receive, and errors that name the function."""

import functools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.ppo_trainer import PROMPTS, count_c

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.trainers.ppo.functions import TAKEN_COLUMNS, checked, function_name


class Length:
    """A reward that is an object."""

    def __call__(self, completions, **_):
        return [float(len(text)) for text in completions]


class Later:
    async def __call__(self, completions, **_):
        return "good"


async def later(completions, **_):
    return [1.0] * (len(completions) - 1)


def outer(completions, **_):
    return inner(completions)


def inner(completions):
    return [{}["missing"] for _ in completions]  # the line that is named


def call(function, count=3):
    texts = [f"text {number}" for number in range(count)]
    return checked(function)(prompts=texts, completions=texts, completion_ids=[[3]] * count)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, None],
        (1, 2.5, None),
        [True, np.float32(2.5), None],
        [torch.tensor(1), torch.tensor(2.5), None],
        (value for value in (1, 2.5, None)),
    ],
)
def test_numbers_in_any_wrapping(values):
    assert call(lambda **_: values) == [1.0, 2.5, None]


def test_whole_tensors_and_arrays_and_what_is_not_finite():
    assert call(lambda **_: torch.tensor([1.0, 2.0, 3.0])) == [1.0, 2.0, 3.0]
    assert call(lambda **_: np.array([1, 2, 3])) == [1.0, 2.0, 3.0]
    one, two, three = call(lambda **_: [math.nan, math.inf, -math.inf])
    assert math.isnan(one) and (two, three) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (0.5, r"returned 0\.5 \(float\); expected a list with one number for each of the 3 completions"),
        (None, r"returned None; expected"),
        ("good", r"returned 'good' \(str\)"),
        ({"score": [1, 2, 3]}, r"returned \{'score': \[1, 2, 3\]\} \(dict\)"),
        (torch.tensor(0.5), r"returned 0\.5 \(float\)"),
        ([1.0, 2.0], r"returned 2 values: \[1\.0, 2\.0\]"),
        ([], r"returned 0 values: \[\]"),
        ([1.0, "good", 2.0], r"returned at index 1 'good' \(str\)"),
        ([1.0, 2.0, {"score": 1.0}], r"returned at index 2 \{'score': 1\.0\} \(dict\)"),
        ([[1.0], [2.0], [3.0]], r"returned at index 0 \[1\.0\] \(list\)"),
        (torch.ones(3, 1), r"returned at index 0 \[1\.0\] \(list\)"),
        ([1.0, 2.0, 1j], r"returned at index 2 1j \(complex\)"),
    ],
)
def test_a_wrong_return_names_function_place_and_value(values, message):
    def own(**_):
        return values

    with pytest.raises(InstructGPTError, match=rf"reward function {__name__}:.*own {message}"):
        call(own)


def test_an_exception_names_the_functions_own_line():
    with pytest.raises(InstructGPTError) as caught:
        call(outer)
    message = str(caught.value)
    assert message.startswith(
        f"reward function {__name__}:outer raised KeyError: 'missing' (test_reward_functions.py, "
    )
    assert '[{}["missing"] for _ in completions]  # the line that is named)' in message
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_exception_inside_a_library_names_the_line_that_called_it():
    def own(completions, **_):
        return np.array(completions).reshape(2, 5)

    with pytest.raises(InstructGPTError, match=r"raised ValueError: .*return np\.array\(completions\)\.reshape"):
        call(own)


def test_what_a_generator_or_an_exit_raises_is_named_too():
    def generated(completions, **_):
        for text in completions:
            yield float(text)

    def ended(**_):
        raise SystemExit("no key for the judge")

    with pytest.raises(InstructGPTError, match=r"generated raised ValueError: .*yield float\(text\)\)"):
        call(generated)
    with pytest.raises(InstructGPTError, match="ended raised SystemExit: no key for the judge"):
        call(ended)


def test_a_function_that_takes_too_little_names_its_definition():
    def own(answers):
        return [0.0] * len(answers)

    with pytest.raises(InstructGPTError, match=r"raised TypeError: .*def own\(answers\):\)"):
        call(own)


def test_what_only_acts_like_a_function_has_a_name():
    assert function_name(Length()) == f"{__name__}:Length"
    assert function_name(functools.partial(count_c, answer=1)) == "helpers.ppo_trainer:count_c"
    assert call(Length()) == [6.0] * 3


def test_columns_reach_functions_under_their_names(make_trainer):
    """Also `completion`, which TRL keeps to itself, in one list per column."""
    seen = []

    def own(prompts, completions, completion, answer, **_):
        seen.extend(zip(prompts, completion, answer, strict=True))
        return [0.0] * len(prompts)

    columns = {"completion": [f"c{number}" for number in range(64)], "answer": list(range(64))}
    prompts = Dataset.from_dict({"prompt": [f"a w{number % 35} w{number // 35}" for number in range(64)], **columns})
    make_trainer(reward=own, prompts=prompts, total_episodes=16).train()
    rows = set(zip(prompts["prompt"], prompts["completion"], prompts["answer"], strict=True))
    assert len(seen) == 16 and set(seen) <= rows


@pytest.mark.parametrize("name", TAKEN_COLUMNS)
def test_a_column_whose_name_is_taken(make_trainer, make_scorer, name):
    prompts = PROMPTS.add_column(name, ["x"] * 64)
    with pytest.raises(InstructGPTError, match=rf"train_dataset: column '{name}': reward functions receive something"):
        make_trainer(reward=count_c, prompts=prompts)
    make_trainer(reward=make_scorer(), prompts=prompts)  # a reward model reads no column


@pytest.mark.parametrize(
    ("function", "message"), [(later, "later returned 15 values"), (Later(), "Later returned 'good'")]
)
def test_coroutine_functions_are_checked_too(make_trainer, function, message):
    with pytest.raises(InstructGPTError, match=message):
        make_trainer(reward=function, total_episodes=16).train()
