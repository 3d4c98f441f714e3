"""The embedded default: a generated micro-world of text, its gold labeler and a tiny base model, all offline.

`write` makes the data files, `base_model_path` is the packaged base model, `gold_scores` and `gold_ranks` are the
labeler, `tasks` are the few-shot items that tell what a stage keeps of the pretraining. Nothing here imports torch,
except the script that makes the base model: `python -m instructgpt_hf.lab.make_base_model`.
"""

from __future__ import annotations

from pathlib import Path

from instructgpt_hf.lab.files import write
from instructgpt_hf.lab.labeler import LABELER_NOISE, gold_ranks, gold_scores
from instructgpt_hf.lab.tasks import tasks

__all__ = ["LABELER_NOISE", "base_model_path", "gold_ranks", "gold_scores", "tasks", "write"]


def base_model_path() -> Path:
    """The folder of the packaged base model: config, tokenizer and weights, ready for `from_pretrained`."""
    return Path(__file__).parent / "base_model"
