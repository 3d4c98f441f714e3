"""Sequence lengths against the positions that models have. A model with learned positions fails on a longer sequence,
and others were not trained on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instructgpt_hf.errors import Problems
from instructgpt_hf.models.loading import load_config, positions
from instructgpt_hf.stages.run import StageRun


def usable_length(run: StageRun, config: Any, max_length: int | None) -> int | None:
    """`max_length`, or the model's positions where these are fewer; then the user is told.

    Args:
        run: of the stage, for the message.
        config: of the model.
        max_length: the stage's setting; longer examples are left out.
    """
    found = positions(config)
    if found is None or (max_length is not None and max_length <= found):
        return max_length
    run.log(f"max_length = {max_length}: the model has {found} positions; longer examples are left out")
    return found


def check_rollout_lengths(
    readers: Iterable[tuple[str, Path]], prompt: int, completion: int, ptx_length: int | None
) -> None:
    """Make sure that every model can read the longest prompt with the longest answer.

    Args:
        readers: role and folder of each model that reads the sampled token ids, the policy first.
        prompt: tokens of the longest prompt.
        completion: `max_completion_length`.
        ptx_length: `ptx_max_length`, which the policy reads; None without a pretraining gradient.

    Raises:
        InstructGPTError: naming the models with fewer positions, and the longest answer that fits.
    """
    problems = Problems("ppo.yaml: sequences are longer than a model reads:")
    for number, (role, folder) in enumerate(readers):
        found = positions(load_config(folder))
        if found is None:
            continue
        total = prompt + completion
        if total > found:
            shorter = f"set max_completion_length to at most {found - prompt}, or " if found > prompt else ""
            problems.add(
                f"max_completion_length = {completion}: with the longest prompt ({prompt} tokens) {total}, and "
                f"the {role} ({folder}) has {found} positions; {shorter}lower max_prompt_length"
            )
        if number == 0 and ptx_length is not None and ptx_length > found:
            problems.add(f"ptx_max_length = {ptx_length}: the policy ({folder}) has {found} positions")
    problems.raise_if_any()
