"""The lab's files: demonstrations, rankings, prompts, pretraining text and tasks, as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instructgpt_hf.lab import corpus
from instructgpt_hf.lab.answers import answer, demonstrate, spoil
from instructgpt_hf.lab.instructions import draw, draw_prompts, parse
from instructgpt_hf.lab.labeler import LABELER_NOISE, gold_ranks
from instructgpt_hf.lab.tasks import tasks

# Rows of each file.
SIZES = {
    "demonstrations.train": 3000,
    "demonstrations.test": 200,
    "rankings.train": 2000,
    "rankings.test": 200,
    "prompts.train": 1500,
    "prompts.test": 500,
    "pretraining.train": 12000,
    "pretraining.test": 400,
    "tasks.test": 450,
}
# The paper shows its labelers 4 to 9 answers to a prompt (section 3.5).
MIN_COMPLETIONS, MAX_COMPLETIONS = 4, 9
STRAY_SHARE, SPOILED_SHARE = 0.2, 0.2


def write(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write all files of the lab into `folder`, which is created if it does not exist; the same seed, the same bytes.

    Returns:
        The path of each file by its name in `SIZES`, such as "demonstrations.train"; a file that existed is replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, size in SIZES.items():
        paths[name] = folder / f"{name}.jsonl"
        with paths[name].open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(name, seed, size))
    return paths


def rows(name: str, seed: int, size: int) -> list[dict[str, Any]]:
    """`size` rows of one file of the lab, such as `rows("rankings.train", 0, 100)`."""
    kind, split = name.split(".")
    if kind == "tasks":
        return tasks(seed, size)
    if kind == "pretraining":
        return [{"text": text} for text in corpus.documents(f"{split} {seed}", size)]
    rng = random.Random(f"{name} {seed}")
    return [_ROW[kind](prompt, rng) for prompt in draw_prompts(rng, size, test=split == "test")]


def _ranking(prompt: str, rng: random.Random) -> dict[str, Any]:
    """Distinct answers of every quality, some of them damaged, with the ranks of a noisy labeler."""
    instruction = parse(prompt)
    wanted = rng.randint(MIN_COMPLETIONS, MAX_COMPLETIONS)
    texts: dict[str, None] = {}  # ordered and distinct
    while len(texts) < wanted:
        # Some answers belong to another instruction: the commonest fault of models, which people do not make.
        answered = draw(rng) if rng.random() < STRAY_SHARE else instruction
        text = answer(answered, rng.random(), rng)
        texts[spoil(text, rng) if rng.random() < SPOILED_SHARE else text] = None
    completions = list(texts)
    return {"prompt": prompt, "completions": completions, "ranks": gold_ranks(prompt, completions, LABELER_NOISE, rng)}


_ROW: dict[str, Callable[[str, random.Random], dict[str, Any]]] = {
    "demonstrations": lambda prompt, rng: {"prompt": prompt, "completion": demonstrate(parse(prompt), rng)},
    "rankings": _ranking,
    "prompts": lambda prompt, rng: {"prompt": prompt},
}
