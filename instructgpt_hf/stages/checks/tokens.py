"""The first rows of a stage's dataset as it will tokenize them: what its prompt format and its limits make of them."""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset

from instructgpt_hf.data.demonstrations import demonstration_ids, demonstration_rows, tokenize_demonstrations
from instructgpt_hf.data.files import Head, Row
from instructgpt_hf.data.prompt_rows import prompt_rows, read_prompts
from instructgpt_hf.data.rankings.rows import encode_ranking, ranking_rows, tokenize_rankings
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.data.rows import raise_unrendered, rendering
from instructgpt_hf.data.splits import hold_back, prompt_keys
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import positions
from instructgpt_hf.stages.checks.models import Policy
from instructgpt_hf.stages.run import StageRun

RENDERED = 200  # rows


def check_tokens(run: StageRun, head: Head, policy: Policy, where: str, holds_back: bool) -> None:
    """Render rows; where these are all there are, also hold their lengths and their number against the settings.

    Args:
        head: rows whose form is right.
        policy: its tokenizer and its prompt format are those of all stages.
        where: name of the dataset in errors.
        holds_back: whether a part of the rows is measured on.

    Raises:
        InstructGPTError: naming every row that cannot be rendered, or the limit that leaves nothing.
    """
    prompt_format, tokenizer = policy.prompt_format, policy.model.tokenizer
    if prompt_format is None:
        return
    stage, settings = run.settings.stage, run.settings
    part = head if len(head) <= RENDERED else Head(head, RENDERED)

    def encode(row: Row) -> Row:
        if stage == "sft":
            demonstration_ids(row, prompt_format, tokenizer)
        elif stage == "reward":
            encode_ranking(row, prompt_format, tokenizer)
        else:
            prompt_format.prompt_ids(row["prompt"], tokenizer)
        return {}

    rows = _read(stage, part, where)
    raise_unrendered((rendering(encode, {})(row, index)["problem"] for index, row in enumerate(rows)), where)
    if stage == "ppo" and not head.more:
        prompts, _ = prompt_rows(head, prompt_format, tokenizer, settings.training_args.max_prompt_length, where)
        _check_number(run, prompts, where, holds_back)
    if stage == "ppo" or part.more:
        return
    limits: tuple[Any, ...] = (settings.training_args.max_length, positions(policy.model.config))
    tokenize: Any = tokenize_demonstrations if stage == "sft" else tokenize_rankings
    longest = min(limit or sys.maxsize for limit in limits)
    tokenize(rows, prompt_format, tokenizer, longest, where, settings.data_args.max_prompt_length)


def _read(stage: str, rows: Head, where: str) -> Any:
    """The rows in their canonical form; none where a ranking may go on behind them."""
    if stage == "sft":
        return demonstration_rows(rows, where)
    if stage == "ppo":
        return read_prompts(rows, where)[0]
    recognised = recognise(rows, where)
    return [] if recognised[0].group is not None and rows.more else ranking_rows(rows, where, recognised)


def _check_number(run: StageRun, prompts: Dataset, where: str, holds_back: bool) -> None:
    """Raise if the prompts to train on do not fill an iteration."""
    episodes = run.settings.training_args.generation_batch_size
    left = hold_back(prompts, prompt_keys(prompts["prompt"]), where).train if holds_back else prompts
    if len(left) < episodes:
        raise InstructGPTError(
            f"{where}: {len(left)} prompts, fewer than generation_batch_size = {episodes} episodes of one iteration; "
            "add prompts or lower generation_batch_size."
        )
