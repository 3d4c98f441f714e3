"""Names of the package as its pages write them, such as `functional.gae`."""

from __future__ import annotations

import dataclasses
import importlib


def assert_symbol_exists(name: str) -> None:
    """Fail unless a dotted name below `instructgpt_hf` is a module, an attribute, or a field of a dataclass."""
    owner = importlib.import_module("instructgpt_hf")
    parts = name.split(".")
    for place, part in enumerate(parts):
        try:
            owner = importlib.import_module("instructgpt_hf." + ".".join(parts[: place + 1]))
        except ModuleNotFoundError:
            fields = {item.name for item in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
            assert hasattr(owner, part) or part in fields, f"{name}: no {part}"
            owner = getattr(owner, part, None)
