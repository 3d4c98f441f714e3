"""What `sft --help`, `reward --help` and `ppo --help` say about the settings of their stage."""

from __future__ import annotations

import json
import textwrap
from typing import Any

WIDTH = 80


def describe(stage: str) -> str:
    """Every setting of a stage with default, help and source: this package's first, then upstream's."""
    from instructgpt_hf._compat.upstream_settings import importable_quickly

    with importable_quickly() as settings:
        known = list(settings.stage_settings(stage).values())
    ours = [item for item in known if item.source is not None]
    theirs = [item for item in known if item.source is None]
    parts = [
        f"Settings of {stage}.yaml with their defaults, added or changed by this package:\n",
        *(_entry(item) for item in ours),
        "\nSettings of TRL and transformers:\n",
        *(_entry(item) for item in theirs),
    ]
    return "\n".join(parts) + "\n"


def in_yaml(value: Any) -> str:
    """A default as a recipe would write it."""
    return json.dumps(value) if value is None or isinstance(value, (bool, list, dict)) else str(value)


def _entry(item: Any) -> str:
    text = " ".join(item.help.split())
    if item.source is not None:
        text = f"{text} ({item.source})".lstrip()
    lines = textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join([f"  --{item.name} {in_yaml(item.default)}", *lines])
