"""The three stages of InstructGPT as one readable page."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from instructgpt_hf._compat import quiet_environment
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.recipe import Recipe
from instructgpt_hf.stages.common import StageRun
from instructgpt_hf.stages.evaluation import evaluate_run
from instructgpt_hf.stages.ppo import run_ppo
from instructgpt_hf.stages.reward import run_reward
from instructgpt_hf.stages.sft import run_sft

NEXT = {"sft": "reward", "reward": "ppo"}


def run(recipe: Recipe, output_dir: str | Path, console: Console | None = None) -> list[Any]:
    """SFT, reward model, PPO, evaluation. What is finished and unchanged is skipped, what was interrupted resumes.

    Args:
        recipe: checked settings of all three stages.
        output_dir: folder of the run.
        console: where progress goes; standard error by default.

    Returns:
        One `PolicyRow` for the base model, the SFT model and each PPO policy.

    Raises:
        InstructGPTError: if something the user gave is unusable; the message says what.
        KeyboardInterrupt: if the user stopped it; the same call resumes.
    """
    started = time.monotonic()
    console = console or Console(stderr=True)
    for stage in recipe.stages:
        run_stage(recipe, stage, output_dir, console, evaluate=False)
    with quiet_environment():
        rows = evaluate_run(_stage_run(recipe, "ppo", output_dir, console))
    _push(recipe, Path(output_dir), console)
    console.print(f"Done in {time.monotonic() - started:.0f} s. {_next_step(Path(output_dir))}", soft_wrap=True)
    return rows


def run_stage(
    recipe: Recipe, stage: str, output_dir: str | Path, console: Console | None = None, evaluate: bool = True
) -> list[StageArtifact]:
    """One stage. PPO with `compare_without_ptx` trains two policies; after PPO the run is evaluated.

    Returns:
        The records of the finished stage, one for each model trained.
    """
    console = console or Console(stderr=True)
    with quiet_environment():
        artifacts = []
        for item in _runs(recipe, stage, output_dir, console):
            artifacts.append({"sft": run_sft, "reward": run_reward, "ppo": run_ppo}[stage](item))
            _free_memory()
        if stage != "ppo":
            console.print(f"Next: `instructgpt-hf {NEXT[stage]} --config {recipe.name} --output_dir {output_dir}`")
            return artifacts
        if evaluate:
            evaluate_run(_stage_run(recipe, stage, output_dir, console))
        return artifacts


def _stage_run(recipe: Recipe, stage: str, output_dir: str | Path, console: Console) -> StageRun:
    settings = recipe.stages[stage]
    name = "ppo-ptx" if stage == "ppo" and settings.training.ptx_coef else stage
    return StageRun(recipe.name, settings, Path(output_dir), name, console)


def _runs(recipe: Recipe, stage: str, output_dir: str | Path, console: Console) -> list[StageRun]:
    """The stage the recipe asks for; before PPO-ptx, to compare, the same without the pretraining gradient."""
    asked = _stage_run(recipe, stage, output_dir, console)
    settings = asked.settings
    if stage != "ppo" or not (settings.training.compare_without_ptx and settings.training.ptx_coef):
        return [asked]
    plain = dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, ptx_coef=0.0, compare_without_ptx=False),
        values={**settings.values, "ptx_coef": 0.0},
    )
    return [StageRun(recipe.name, plain, Path(output_dir), "ppo", console), asked]


def _free_memory() -> None:
    """Give back a finished stage's models now: trainers are reference cycles, which only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _push(recipe: Recipe, folder: Path, console: Console) -> None:
    """Push the finished stages whose recipe says `push_to_hub`."""
    wanted = [stage for stage, settings in recipe.stages.items() if settings.values.get("push_to_hub")]
    if not wanted:
        return
    from instructgpt_hf.hub.publish import push_run

    stages = [name for stage in wanted for name in ((stage,) if stage != "ppo" else ("ppo", "ppo-ptx"))]
    finished = [name for name in stages if (folder / name).is_dir()]
    private = all(recipe.stages[stage].values.get("hub_private_repo") is not False for stage in wanted)
    push_run(folder, None, private=private, stages=finished, console=console)


def _next_step(folder: Path) -> str:
    return f"Next: read {folder}/evaluation/report.md; `instructgpt-hf push {folder}` puts the stages on the Hub."
