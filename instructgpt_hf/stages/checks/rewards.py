"""One call of every reward function of a recipe, on two of its prompts."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from instructgpt_hf.stages.checks.report import Report
from instructgpt_hf.stages.reward_sources import find_functions
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.trainers.ppo.functions import RewardFunction, check_columns, checked, is_coroutine_function

PROMPTS = 2
COMPLETION = "This is an answer."  # in the place of one that is sampled


def check_functions(
    run: StageRun, prompts: Dataset | None, tokenizer: PreTrainedTokenizerBase | None, report: Report
) -> None:
    """Find every reward function and call it once, as in training, with a completion that nobody sampled.

    Args:
        prompts: first rows of the prompts; None if they cannot be read, which is a problem of its own.
        tokenizer: of the policy; without one, completions have invented token ids.
    """
    names = run.settings.data_args.reward_functions
    if not names:
        return
    functions: dict[str, RewardFunction] = {}
    with report.setting("ppo", "reward_functions", names):
        functions = find_functions(names)
    if prompts is None:
        return
    with report.setting("ppo", "dataset_name"):
        check_columns(prompts.column_names, f"prompts: {run.settings.data_args.dataset_name}")
    for name, function in functions.items():
        with report.setting("ppo", "reward_functions"):
            values = try_function(function, prompts.select(range(min(PROMPTS, len(prompts)))), tokenizer)
            report.found("ppo", "reward function", name, f"a trial returned {values}")


def try_function(
    function: RewardFunction, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None
) -> list[float | None]:
    """What a reward function returns for prompts with `COMPLETION`.

    Raises:
        InstructGPTError: if it raises, or returns something wrong.
    """
    chat = not isinstance(rows[0]["prompt"], str)
    completion: Any = [{"role": "assistant", "content": COMPLETION}] if chat else COMPLETION
    ids = [3, 4, 5]
    if tokenizer is not None:
        ids = [*tokenizer(COMPLETION, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    received = {
        "prompts": list(rows["prompt"]),
        "completions": [completion] * len(rows),
        "completion_ids": [ids] * len(rows),
        **{name: list(rows[name]) for name in rows.column_names if name != "prompt"},
        "trainer_state": TrainerState(),
        "log_extra": _ignore,
        "log_metric": _ignore,
    }
    with _own_randomness():
        values: Any = checked(function)(**received)
        return asyncio.run(values) if is_coroutine_function(function) else values


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Put the random states back: what the block draws must not change the models that are made after it."""
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(plain)
    np.random.set_state(arrays)


def _ignore(*_: Any, **__: Any) -> None:
    """In the place of TRL's logging."""
