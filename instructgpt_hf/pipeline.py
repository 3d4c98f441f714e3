"""InstructGPT from first to last (figure 2): demonstrations, rankings, PPO, then evaluation and push."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from instructgpt_hf._compat.quirks import quiet_environment
from instructgpt_hf.artifacts import FOLDERS_OF, STAGES, StageArtifact
from instructgpt_hf.config.recipe import Recipe
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.hub.publish import push_run
from instructgpt_hf.stages.checks.report import Finding, Report
from instructgpt_hf.stages.checks.run import check_run
from instructgpt_hf.stages.evaluation import evaluate_run
from instructgpt_hf.stages.folder import hold
from instructgpt_hf.stages.output import Output, Phase
from instructgpt_hf.stages.ppo import PPOStage
from instructgpt_hf.stages.processes import is_main, leave
from instructgpt_hf.stages.reward import RewardStage
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.stages.sft import SFTStage
from instructgpt_hf.stages.stage import Stage, train_stage

LONG_CHECK = 30  # seconds after which a run that is still being checked begins its log file

_STAGE: dict[str, type[Stage[Any, Any, Any]]] = {"sft": SFTStage, "reward": RewardStage, "ppo": PPOStage}


def check(
    recipe: Recipe, output_dir: str | Path, console: Console | None = None, quiet: bool = False
) -> list[Finding]:
    """Look at everything that the stages of a recipe will read and write; no model is loaded and nothing is written.

    Args:
        recipe: checked settings of all stages, or of one, whose earlier ones must then be finished.
        output_dir, console, quiet: as for `run`.

    Returns:
        What was found, which is printed too.

    Raises:
        InstructGPTError: listing every problem of every stage.
    """
    with Output(console, quiet) as output:
        report = _check(recipe, list(recipe.stages), Path(output_dir), output)
        output.result(report.table())
        output.result(f"All {len(report.findings)} checks passed; nothing was trained.")
        return report.findings


def run(
    recipe: Recipe, output_dir: str | Path, console: Console | None = None, quiet: bool = False
) -> list[PolicyRow]:
    """SFT, reward model, PPO, evaluation. What is finished and unchanged is skipped, what was interrupted resumes.

    Args:
        recipe: checked settings of all its stages.
        output_dir: folder of the run, which also gets `log.txt`.
        console: takes results and progress; by default they go to standard output and standard error.
        quiet: print results only.

    Returns:
        One `PolicyRow` for the base model, the SFT model and each PPO policy; of several training processes, the main
        one evaluates, and the others return nothing.

    Raises:
        InstructGPTError: if something the user gave is unusable; the message says what.
        KeyboardInterrupt: if the user stopped it; the same call resumes.
    """
    started, folder = time.monotonic(), Path(output_dir)
    with Output(console, quiet) as output, hold(folder, output.console):
        output.open_log(folder, after=LONG_CHECK)
        _check(recipe, list(recipe.stages), folder, output)
        for stage in recipe.stages:
            _train(recipe, stage, folder, output)
        leave()
        if not is_main():
            return []
        with quiet_environment():
            rows = evaluate_run(_policy_run(recipe, folder, output))
        for stage in recipe.stages:
            _push(recipe, stage, folder, output)
        output.log(f"Done in {time.monotonic() - started:.0f} s. {_next_step(recipe, 'ppo', folder)}")
        return rows


def run_stage(
    recipe: Recipe,
    stage: str,
    output_dir: str | Path,
    console: Console | None = None,
    part_of_run: bool = False,
    quiet: bool = False,
) -> list[StageArtifact]:
    """One stage. PPO with `compare_without_ptx` trains two policies.

    Args:
        recipe: checked settings of the stage.
        stage: one of `artifacts.STAGES`.
        output_dir, console, quiet: as for `run`.
        part_of_run: leave it to the caller to evaluate the policies, to push, and to say what to do next.

    Returns:
        The records of the finished stage, one for each model trained.
    """
    folder = Path(output_dir)
    with Output(console, quiet) as output, hold(folder, output.console):
        if not part_of_run:
            output.open_log(folder, after=LONG_CHECK)
            _check(recipe, [stage], folder, output)
        artifacts = _train(recipe, stage, folder, output)
        if part_of_run:
            return artifacts
        leave()
        if not is_main():
            return artifacts
        if stage == "ppo":
            with quiet_environment():
                evaluate_run(_policy_run(recipe, folder, output))
        _push(recipe, stage, folder, output)
        output.log(_next_step(recipe, stage, folder))
        return artifacts


def _check(recipe: Recipe, stages: list[str], folder: Path, output: Output) -> Report:
    """Everything that `stages` need, before any of them loads a model."""
    runs = [run for stage in stages for run in _runs(recipe, stage, folder, output)]
    with quiet_environment(), runs[0].phase("checking data, models and reward functions", bar=False):
        return check_run(runs)


def _train(recipe: Recipe, stage: str, folder: Path, output: Output) -> list[StageArtifact]:
    artifacts = []
    with quiet_environment():
        for stage_run in _runs(recipe, stage, folder, output):
            artifacts.append(train_stage(_STAGE[stage](stage_run)))
            _free_memory()
    return artifacts


def _runs(recipe: Recipe, stage: str, folder: Path, output: Output) -> list[StageRun]:
    """The runs of one stage: one, or for PPO-ptx with `compare_without_ptx` two, plain PPO first."""
    if stage != "ppo":
        return [StageRun(recipe.name, recipe.stages[stage], folder, stage, output)]
    policy_run = _policy_run(recipe, folder, output)
    training_args = policy_run.settings.training_args
    if not (training_args.compare_without_ptx and training_args.ptx_coef):
        return [policy_run]
    plain = dataclasses.replace(
        policy_run.settings,
        training_args=dataclasses.replace(training_args, ptx_coef=0.0, compare_without_ptx=False),
        values={**policy_run.settings.values, "ptx_coef": 0.0},
    )
    return [StageRun(recipe.name, plain, folder, "ppo", output), policy_run]


def _policy_run(recipe: Recipe, folder: Path, output: Output) -> StageRun:
    settings = recipe.stages["ppo"]
    return StageRun(recipe.name, settings, folder, "ppo-ptx" if settings.training_args.ptx_coef else "ppo", output)


def _free_memory() -> None:
    """Free a finished stage's models: trainers are reference cycles, which only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _push(recipe: Recipe, stage: str, folder: Path, output: Output) -> None:
    """Push a finished stage, private unless told otherwise, if its recipe says `push_to_hub`."""
    values = recipe.stages[stage].values
    if values.get("push_to_hub"):
        finished = [name for name in FOLDERS_OF[stage] if (folder / name).is_dir()]
        private = values.get("hub_private_repo") is not False
        with output.phase(Phase("pushing to the Hub", stage=stage, bar=False)):
            push_run(folder, None, private=private, stages=finished, prefix=recipe.name, console=output.results)


def _next_step(recipe: Recipe, stage: str, folder: Path) -> str:
    if stage != "ppo":
        later = STAGES[STAGES.index(stage) + 1 :]
        following = next((name for name in later if (recipe.folder / f"{name}.yaml").is_file()), later[0])
        return f"Next: `instructgpt-hf {following} --config {recipe.name} --output_dir {folder}`"
    return f"Next: read {folder}/evaluation/report.md; `instructgpt-hf push {folder}` puts the stages on the Hub."
