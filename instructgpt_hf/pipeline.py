"""The three stages of InstructGPT as one readable page."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from instructgpt_hf._compat.quirks import quiet_environment
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import Recipe
from instructgpt_hf.stages.evaluation import evaluate_run
from instructgpt_hf.stages.fit import own_tracker_run
from instructgpt_hf.stages.ppo import run_ppo
from instructgpt_hf.stages.processes import is_main, leave
from instructgpt_hf.stages.reward import run_reward
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.stages.sft import run_sft

NEXT = {"sft": "reward", "reward": "ppo"}


def run(recipe: Recipe, output_dir: str | Path, console: Console | None = None) -> list[Any]:
    """SFT, reward model, PPO, evaluation. What is finished and unchanged is skipped, what was interrupted resumes.

    Args:
        recipe: checked settings of all three stages.
        output_dir: folder of the run.
        console: where progress goes; standard error by default.

    Returns:
        One `PolicyRow` for the base model, the SFT model and each PPO policy; of several training processes, the main
        one evaluates, and the others return nothing.

    Raises:
        InstructGPTError: if something the user gave is unusable; the message says what.
        KeyboardInterrupt: if the user stopped it; the same call resumes.
    """
    started = time.monotonic()
    console = console or Console(stderr=True)
    for stage in recipe.stages:
        run_stage(recipe, stage, output_dir, console, part_of_run=True)
    leave()
    if not is_main():
        return []
    with quiet_environment():
        rows = evaluate_run(_stage_run(recipe, "ppo", output_dir, console))
    for stage in recipe.stages:
        _push(recipe, stage, Path(output_dir), console)
    step = _next_step(recipe.name, "ppo", Path(output_dir))
    console.print(f"Done in {time.monotonic() - started:.0f} s. {step}", soft_wrap=True)
    return rows


def run_stage(
    recipe: Recipe, stage: str, output_dir: str | Path, console: Console | None = None, part_of_run: bool = False
) -> list[StageArtifact]:
    """One stage. PPO with `compare_without_ptx` trains two policies.

    Args:
        part_of_run: leave it to the caller to evaluate the policies, to push, and to say what to do next.

    Returns:
        The records of the finished stage, one for each model trained.
    """
    console = console or Console(stderr=True)
    with quiet_environment():
        artifacts = []
        for item in _runs(recipe, stage, output_dir, console):
            with own_tracker_run():
                artifacts.append({"sft": run_sft, "reward": run_reward, "ppo": run_ppo}[stage](item))
            _free_memory()
        if part_of_run:
            return artifacts
        leave()
        if not is_main():
            return artifacts
        if stage == "ppo":
            evaluate_run(_stage_run(recipe, stage, output_dir, console))
    _push(recipe, stage, Path(output_dir), console)
    console.print(_next_step(recipe.name, stage, Path(output_dir)), soft_wrap=True)
    return artifacts


def _stage_run(recipe: Recipe, stage: str, output_dir: str | Path, console: Console) -> StageRun:
    settings = recipe.stages[stage]
    name = "ppo-ptx" if stage == "ppo" and settings.training_args.ptx_coef else stage
    return StageRun(recipe.name, settings, Path(output_dir), name, console)


def _runs(recipe: Recipe, stage: str, output_dir: str | Path, console: Console) -> list[StageRun]:
    """The stage the recipe asks for; before PPO-ptx, to compare, the same without the pretraining gradient."""
    asked = _stage_run(recipe, stage, output_dir, console)
    settings = asked.settings
    if stage != "ppo" or not (settings.training_args.compare_without_ptx and settings.training_args.ptx_coef):
        return [asked]
    plain = dataclasses.replace(
        settings,
        training_args=dataclasses.replace(settings.training_args, ptx_coef=0.0, compare_without_ptx=False),
        values={**settings.values, "ptx_coef": 0.0},
    )
    return [StageRun(recipe.name, plain, Path(output_dir), "ppo", console), asked]


def _free_memory() -> None:
    """Give back a finished stage's models now: trainers are reference cycles, which only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _push(recipe: Recipe, stage: str, folder: Path, console: Console) -> None:
    """Push a finished stage, private unless told otherwise, if its recipe says `push_to_hub`."""
    values = recipe.stages[stage].values
    if not values.get("push_to_hub"):
        return
    from instructgpt_hf.hub.publish import push_run

    names = [name for name in ((stage,) if stage != "ppo" else ("ppo", "ppo-ptx")) if (folder / name).is_dir()]
    private = values.get("hub_private_repo") is not False
    push_run(folder, None, private=private, stages=names, prefix=recipe.name, console=console)


def _next_step(recipe: str, stage: str, folder: Path) -> str:
    if stage != "ppo":
        return f"Next: `instructgpt-hf {NEXT[stage]} --config {recipe} --output_dir {folder}`"
    return f"Next: read {folder}/evaluation/report.md; `instructgpt-hf push {folder}` puts the stages on the Hub."
