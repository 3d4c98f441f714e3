"""Compares what both sides compute on stored completions."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common.equality import Gradients, gradient_difference, relative, require_equal, require_same_parameters
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.models.loading import load_tokenizer
from sides.job import OURS, PEER, POLICY, Job
from sides.models import make_prompts
from sides.running import running

# Largest relative difference in float32.
BOUND = 1e-3
# Compared completions end on average at a third of the longest; lengths 1 and the longest are among them.
EPISODES, TOKENS = 4, 16
# The second step's gradient is that of moved weights, in which rounding grows with the length of the first step.
LEARNING_RATE = 0.02


def check(pythons: dict[str, str], job: Job) -> dict[str, dict[str, float]]:
    """Let both sides take two steps on stored completions, and compare.

    Returns:
        Relative differences for completions of full length, and for those that end early.

    Raises:
        BenchmarkError: if they differ.
    """
    tokenizer = load_tokenizer(Path(job.folder) / POLICY)
    differences = {}
    for name, ends in (("full length", False), ("ending early", True)):
        one = replace(
            job,
            **stored(job.prompts, min(job.completion, TOKENS), ends, tokenizer, len(tokenizer)),
            biases={},  # an excluded EOS has a log-probability that leaves no digits
            # With lambda = 1 and no discount, the place of the score does not change an advantage: TRL places it
            # after EOS, this package on EOS.
            lam=1.0 if ends else job.lam,
            dtype="float32",
            learning_rate=LEARNING_RATE,
        )
        records = {}
        with tempfile.TemporaryDirectory() as folder:
            for side, python in pythons.items():
                one = replace(one, record=f"{folder}/{side}.pt")
                with running(side, python, one):
                    records[side] = torch.load(one.record)
        differences[name] = compare(records[PEER], records[OURS], whole=not ends)
    return differences


def stored(
    prompts: list[list[int]], completion: int, ends: bool, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> dict[str, Any]:
    """A few prompts with random completions: fields of a `Job`.

    Args:
        prompts: to choose from.
        completion: length of the longest completion.
        ends: whether lengths go from 1 to the longest, and all but the longest end with EOS; else all are longest.
        tokenizer: of the models.
        vocabulary: number of tokens that the models know.
    """
    fractions = [index / (EPISODES - 1) for index in range(EPISODES)]
    completions = make_prompts(EPISODES, completion, completion, tokenizer, vocabulary)
    if ends:
        for index, fraction in enumerate(fractions[:-1]):
            completions[index][round((completion - 1) * fraction**2) :] = [tokenizer.eos_token_id]
    return {
        "prompts": [prompts[round(fraction * (len(prompts) - 1))] for fraction in fractions],
        "completions": completions,
        **dict.fromkeys(("episodes", "minibatch", "micro_batch", "rollout_batch"), EPISODES),
    }


def compare(peer: dict[str, Any], ours: dict[str, Any], whole: bool) -> dict[str, float]:
    """Relative differences of everything in two records.

    Args:
        peer: recorded by TRL.
        ours: recorded by this package.
        whole: also the value model's loss and gradient. TRL gives a completion that ends early one value more than
            this package, that of the state after EOS.

    Raises:
        BenchmarkError: if one is above the bound, or the sides train different parameters.
    """
    differences = {name: relative([item], [ours["tensors"][name]]) for name, item in peer["tensors"].items()}
    for name in ("kl", "policy_loss", *(["value_loss"] if whole else [])):
        expected, actual = peer["scalars"][name], ours["scalars"][name]
        differences[name] = abs(actual - expected) / abs(expected)
    for number, steps in enumerate(zip(peer["steps"], ours["steps"], strict=True), start=1):
        require_same_parameters(*steps)
        for role in ("policy", *(["value_model"] if whole else [])):
            differences[f"{role}_gradient_{number}"] = gradient_difference(*(_of_role(step, role) for step in steps))
    require_equal(differences, BOUND)
    return differences


def _of_role(gradients: Gradients, role: str) -> Gradients:
    return {name: item for name, item in gradients.items() if name.startswith(role)}
