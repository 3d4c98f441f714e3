"""Rows of any values in any known columns are read, or are an error that a user can act on: never a traceback."""

import datetime
import random
from decimal import Decimal

import pytest

from instructgpt_hf.data.demonstrations import demonstration_rows
from instructgpt_hf.data.pretraining import pretraining_rows
from instructgpt_hf.data.prompt_rows import read_prompts, to_dataset
from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.data.rankings.schemas import SCHEMAS
from instructgpt_hf.data.schemas import ANSWERS, INPUTS, PROMPTS, SYSTEMS, TEXT
from instructgpt_hf.errors import InstructGPTError

COLUMNS = sorted({*PROMPTS, *ANSWERS, *INPUTS, *SYSTEMS, TEXT, "history", "labeler", "row"})
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SIMPLE = [None, "", " ", "a", 3, -1, 2.5, float("nan"), float("inf"), True, b"x", 10**30, Decimal("NaN"), (1, 2)]
LISTS = [[], {}, ["a", "b"], ["a", None], [1, 2], [None, None], [["a", "b"]], [{}], [[]], [None], [[1, 2], [3]]]
MESSAGES = [USER, [USER], [USER, ASSISTANT], [ASSISTANT], [{"role": "user"}], [{"role": ["x"], "content": "a"}]]
WRITTEN = [
    "[{",
    "{'role'",
    "['a', 'b']",
    "[1, 2]",
    str([USER]),
    "\n\nHuman: a\n\nAssistant: b",
    "Human:\n\nAssistant:",
]
PUBLISHED = [[{"response": "x"}], [{"answer": "a", "rank": 1}], {"message_id": "1", "replies": [{}]}, {"post": "x"}]
VALUES = [
    *SIMPLE,
    *LISTS,
    *MESSAGES,
    *WRITTEN,
    *PUBLISHED,
    datetime.datetime(2020, 1, 1),
    [{"input": "a", "output": 1}],
]


def prompts(rows, where):
    to_dataset(read_prompts(rows, where)[0], with_columns=True)


@pytest.mark.parametrize("read", [demonstration_rows, prompts, ranking_rows, pretraining_rows])
def test_no_traceback(read):
    rng = random.Random(0)
    known = [schema.columns for schema in SCHEMAS]
    for _ in range(1_500):
        names = rng.choice([rng.choice(known), ()]) + tuple(rng.sample(COLUMNS, rng.randint(1, 3)))
        kept = [[name for name in names if rng.random() < 0.8] for _ in range(rng.randint(1, 3))]
        rows = [{name: rng.choice(VALUES) for name in row} for row in kept]
        try:
            read(rows, "data")
        except InstructGPTError:
            continue
