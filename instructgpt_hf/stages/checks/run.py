"""The checks of a whole run or of one stage."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from datasets.utils import disable_progress_bars
from huggingface_hub import constants, get_token

from instructgpt_hf import lab
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.publish import check_name
from instructgpt_hf.stages.checks.data import check_data
from instructgpt_hf.stages.checks.disk import check_disk
from instructgpt_hf.stages.checks.hub import hub_or_cache
from instructgpt_hf.stages.checks.models import (
    Policy,
    check_adapters,
    check_base,
    check_positions,
    check_previous_sft,
    check_reward_start,
    check_rewards,
)
from instructgpt_hf.stages.checks.report import Report
from instructgpt_hf.stages.checks.rewards import check_functions
from instructgpt_hf.stages.lifecycle import check_folder, check_launch
from instructgpt_hf.stages.run import StageRun


def check_run(runs: Sequence[StageRun]) -> Report:
    """Check everything that stages will read, and that they can write, without loading a model or writing anything.

    Datasets are looked at by their first rows, models by their configs and tokenizers; reward functions are called
    once. Each stage repeats its own checks on all rows.

    Args:
        runs: stages in their order. A stage may read what an earlier one of them will write; anything else must exist.

    Raises:
        InstructGPTError: listing every problem of every stage, each with its setting and value.
    """
    disable_progress_bars()
    report, own = Report(), None
    for run in runs:
        _check_outputs(run, report)
    # Plain PPO and PPO-ptx read the same, and the text as well: the second one is looked at.
    stages = {run.settings.stage: run for run in runs}
    with tempfile.TemporaryDirectory() as temporary, hub_or_cache(runs, report):
        for stage, run in stages.items():
            named = None if stage == "sft" else run.settings.data_args.sft_model_path
            if stage == "sft":
                policy = own = check_base(run, report)
                if own is not None:
                    check_adapters(stages, own.model, report)
            else:
                policy = own if named is None and "sft" in stages else check_previous_sft(run, report)
            rows = check_data(run, functools.partial(_lab_folder, run, Path(temporary)), policy, report)
            if stage == "reward":
                check_reward_start(run, policy, report)
            if stage == "ppo":
                _check_ppo(run, policy, rows, "reward" in stages, report)
            if policy is not None and stage == list(stages)[-1]:
                check_disk(runs, policy.model, report)
    report.problems.raise_if_any(limit=100)
    return report


def _check_outputs(run: StageRun, report: Report) -> None:
    """How the stage is launched, its folder, and whether it can be pushed in the end."""
    stage = run.settings.stage
    with report.setting(stage, "launch"):
        check_launch(run.settings.training_args, stage)
    with report.setting(stage, "--output_dir", str(run.run_folder)):
        check_folder(run)
    with report.setting(stage, "push_to_hub", run.settings.values.get("push_to_hub")):
        if run.settings.values.get("push_to_hub"):
            check_name(run.recipe, run.name)
            if constants.HF_HUB_OFFLINE:
                raise InstructGPTError("offline mode is on; unset HF_HUB_OFFLINE, or push_to_hub.")
            if get_token() is None:
                raise InstructGPTError(
                    "there is no token for the Hub; log in with `hf auth login`, set HF_TOKEN, or push later with "
                    "`instructgpt-hf push`."
                )
            report.found(stage, "push", "the Hub", "a token is there")


def _check_ppo(run: StageRun, policy: Policy | None, rows: Dataset | None, trained: bool, report: Report) -> None:
    """Rewards of all kinds, and lengths; `trained` says whether the run trains a reward model."""
    check_rewards(run, policy, trained, report)
    if trained:  # else the stage itself says more, before it loads a model
        check_positions(run, policy, report)
    check_functions(run, rows, policy.model.tokenizer if policy else None, report)


def _lab_folder(run: StageRun, temporary: Path) -> Path:
    """The lab's files of the stage's seed: those of the run, or else some that are gone after the checks."""
    if run.lab_path.is_dir():
        return run.lab_path
    folder = temporary / str(run.seed)
    if not folder.is_dir():
        lab.write(folder, seed=run.seed)
    return folder
