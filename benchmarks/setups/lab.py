"""The lab's rows, and the finished SFT and reward stages of a `tiny-cpu` run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common.memory import BenchmarkError

from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.lab import gold_scores
from instructgpt_hf.lab.files import SIZES, rows
from instructgpt_hf.models.loading import load_tokenizer
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.scoring import score_token_lists

RECIPE = "tiny-cpu"


def lab_rows(name: str) -> list[dict[str, Any]]:
    """All rows of one of the lab's files, such as `prompts.train`."""
    return rows(name, 0, SIZES[name])


class LabRun:
    """SFT model, its prompt format, and reward model of a run.

    Args:
        run: folder of a run of the recipe with finished stages `sft` and `reward`.

    Raises:
        BenchmarkError: if one of the stages is missing.
    """

    def __init__(self, run: Path) -> None:
        self.sft, self.reward = run / "sft", run / "reward"
        for stage in (self.sft, self.reward):
            if not (stage / "stage.json").is_file():
                raise BenchmarkError(
                    f"{stage}: no finished stage; `instructgpt-hf sft --config {RECIPE} --output_dir {run}` and the "
                    "same with `reward` make both"
                )
        self.tokenizer = load_tokenizer(self.sft)
        self.format = PromptFormat.from_dict(StageArtifact.load(self.sft).prompt_format)
        self.reward_model = load_reward_model(self.reward)

    def rewards(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], prompts: list[str], texts: list[str]
    ) -> tuple[float, float]:
        """Mean score of the reward model, which reads ids, and of the gold labeler, which reads text."""
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        scores = score_token_lists(self.reward_model, sequences, self.tokenizer.pad_token_id, 64)
        return statistics.fmean(scores), statistics.fmean(gold_scores(prompts, texts))
