"""The first rows of every dataset that a run will read: their columns and their form."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from datasets import config as libraries

from instructgpt_hf.data.demonstrations import demonstration_rows
from instructgpt_hf.data.files import Head
from instructgpt_hf.data.pretraining import pretraining_rows
from instructgpt_hf.data.prompt_rows import read_prompts, to_dataset
from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.data.rankings.schemas import recognise
from instructgpt_hf.data.sources import Sources, load_split, local_files
from instructgpt_hf.data.splits import test_split
from instructgpt_hf.errors import InstructGPTError, loading_errors
from instructgpt_hf.lab import LAB_PREFIX
from instructgpt_hf.stages.checks.models import Policy
from instructgpt_hf.stages.checks.report import Report
from instructgpt_hf.stages.checks.tokens import check_tokens
from instructgpt_hf.stages.run import StageRun

ROWS = 20  # looked at of each dataset
SMALL = 4 * 2**20  # bytes of local files that are read whole, which takes less than a second
ROLES = {"sft": "demonstrations", "reward": "rankings", "ppo": "prompts"}


def read_head(source: str, split: str, config: str | None, role: str, count: int = ROWS) -> Head:
    """The first rows of a split, read without the rest where that is possible; of small local files, all rows.

    Raises:
        InstructGPTError: if it cannot be read or has no rows.
    """
    # Without a network, a Hub dataset is read from the cache, which holds it whole.
    files = local_files(source, split, role, config)
    streaming = not libraries.HF_HUB_OFFLINE and files is None
    if files is not None and sum(file.stat().st_size for file in files) <= SMALL:
        count = sys.maxsize - 1
    rows = load_split(source, split, config, role, streaming)
    with loading_errors(f"{role}: {source} (split {split!r}) cannot be read", Exception):
        head = Head(rows, count)
    if not head:
        raise InstructGPTError(f"{role}: {source} (split {split!r}) has no rows.")
    return head


def described(head: Head, what: str) -> str:
    """For the table: how many rows were read, and as what."""
    count = f"first {len(head)} rows" if head.more else f"{len(head)} rows"
    return f"{count}: {what}"


def check_data(run: StageRun, lab_folder: Callable[[], Path], policy: Policy | None, report: Report) -> Dataset | None:
    """The stage's dataset, its test split and its pretraining text; returns PPO's first prompts, with all columns.

    `policy` is what reads the rows; None where it is not known, which is a problem of its own.
    """
    stage, args = run.settings.stage, run.settings.data_args
    role, name, config = ROLES[stage], str(args.dataset_name), args.dataset_config
    sources, test, train, prompts = Sources(lab_folder), None, None, None

    def head(split: str, count: int) -> Head:
        return read_head(sources.resolve(name, split, role), split, config, role, count)

    with report.setting(stage, "dataset_name", name):
        test = test_split(args, role)
        count = run.settings.training_args.generation_batch_size if stage == "ppo" else 0
        train = head(args.dataset_train_split, max(ROWS, 2 * count))
        report.found(stage, role, name, described(train, _form(role, train, f"{role}: {name}")))
        if stage == "ppo":
            prompts = to_dataset(read_prompts(train, f"{role}: {name}")[0][:ROWS], with_columns=True)
        _check_number(run, train, test is None)
        if policy is not None:
            check_tokens(run, train, policy, f"{role}: {name}", test is None)
    if test is not None and train is not None:
        with report.setting(stage, "dataset_test_split", test):
            held_back = head(test, ROWS)
            form = _form(role, held_back, f"{role}: {name} (split {test!r})")
            report.found(stage, f"{role}, {test}", name, described(held_back, form))
    weight = {"sft": "pretraining_mix", "ppo": "ptx_coef"}.get(stage)
    if weight is not None and (value := getattr(run.settings.training_args, weight)):
        _check_pretraining(run, sources, weight, value, report)
    return prompts


def _check_number(run: StageRun, train: Head, holds_back: bool) -> None:
    """Raise if there are too few rows to hold some back."""
    role, name, count = ROLES[run.settings.stage], run.settings.data_args.dataset_name, len(train)
    if holds_back and not train.more and count < 2:
        raise InstructGPTError(f"{role}: {name} has 1 row; at least 2 are needed to hold one back for measuring.")


def _form(role: str, rows: Head, where: str) -> str:
    """What the rows are read as; raises if they have no known form."""
    if role == "demonstrations":
        demonstration_rows(rows, where)
    elif role == "prompts":
        read_prompts(rows, where)
    else:
        schema, first = recognise(rows, where)
        if schema.group is None:  # else a ranking may go on behind the first rows
            ranking_rows(rows, where, (schema, first))
        return schema.name
    return ", ".join(rows[0])


def _check_pretraining(run: StageRun, sources: Sources, setting: str, weight: float, report: Report) -> None:
    stage, args = run.settings.stage, run.settings.data_args
    name, column = args.pretraining_dataset_name, args.pretraining_dataset_text_field
    with report.setting(stage, "pretraining_dataset_name", name):
        if name is None:
            raise InstructGPTError(f"{setting} = {weight} needs the text to mix in; {setting}: 0 does without.")
        splits = [args.pretraining_dataset_split, *(["test"] if name.startswith(LAB_PREFIX) else [])]
        for split in splits:
            source = sources.resolve(name, split, "pretraining")
            head = read_head(source, split, args.pretraining_dataset_config, "pretraining")
            pretraining_rows(head, f"pretraining: {name}", column)
        report.found(stage, "pretraining", name, described(head, column))
