"""Settings given as words of the command line: `--ppo.beta 0.05`, `--seed=3`, `--use_peft`. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from instructgpt_hf.config.catalog import STAGES
from instructgpt_hf.errors import Problems

COMMAND_LINE = "command line"


class Override(NamedTuple):
    """One setting of the command line. `value` is one word, a list of several words, or True for a bare flag."""

    stage: str | None
    key: str
    value: Any

    @property
    def option(self) -> str:
        return f"--{self.stage}.{self.key}" if self.stage else f"--{self.key}"


def parse_overrides(words: Sequence[str], problems: Problems) -> list[Override]:
    """The settings in `words`; what cannot be read is added to `problems`."""
    found: list[Override] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--") or word == "--":
            problems.add(
                f"{COMMAND_LINE}: {word!r}: not a setting; write --key value, or --ppo.key value for one stage"
            )
            continue
        name, equals, text = word[2:].partition("=")
        values = [text] if equals else []
        while not equals and index < len(words) and not words[index].startswith("--"):
            values.append(words[index])
            index += 1
        stage, dot, key = name.rpartition(".")
        if dot and stage not in STAGES:
            problems.add(f"{COMMAND_LINE}: --{name}: {stage!r} is not a stage; choose from {', '.join(STAGES)}")
            continue
        value: Any = True if not values else values[0] if len(values) == 1 else values
        found.append(Override(stage or None, key.replace("-", "_"), value))
    return found
