"""The lab: generated text about a micro-world, its gold labeler and a tiny base model, for runs without a network.

`write` makes the data files, `base_model_path` is the packaged base model, `gold_scores` and `gold_ranks` are the
labeler, `tasks` are few-shot items that measure what a stage keeps of the pretraining. Only the script that makes the
base model, `python -m instructgpt_hf.lab.make_base_model`, imports torch.
"""

from __future__ import annotations

from pathlib import Path

from instructgpt_hf.errors import InstructGPTError, nearest
from instructgpt_hf.lab.files import write
from instructgpt_hf.lab.labeler import LABELER_NOISE, gold_ranks, gold_scores
from instructgpt_hf.lab.tasks import tasks

# In settings, `lab:demonstrations` names a dataset of the lab and `lab` its base model.
LAB_PREFIX = "lab:"
LAB_MODEL = "lab"
LAB_DATASETS = ("demonstrations", "rankings", "prompts", "pretraining")

__all__ = [
    "LABELER_NOISE",
    "LAB_DATASETS",
    "LAB_MODEL",
    "LAB_PREFIX",
    "base_model_path",
    "gold_ranks",
    "gold_scores",
    "lab_kind",
    "tasks",
    "write",
]


def base_model_path() -> Path:
    """Folder of the packaged base model: config, tokenizer and weights, as `from_pretrained` reads them."""
    return Path(__file__).parent / "base_model"


def lab_kind(name: str, role: str) -> str:
    """The `<kind>` of a dataset name `lab:<kind>`.

    Args:
        name: dataset name with the prefix.
        role: what the data is for; named in the error.

    Raises:
        InstructGPTError: if the lab has no such dataset.
    """
    kind = name.removeprefix(LAB_PREFIX)
    if kind not in LAB_DATASETS:
        raise InstructGPTError(f"{role}: {name!r} is not a dataset of the lab; {nearest(kind, LAB_DATASETS)}")
    return kind
