"""docs/paper-map.md names only symbols and test files that exist."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs" / "paper-map.md"
PACKAGES = "artifacts|config|data|evaluation|functional|lab|models|trainers"


def names(pattern):
    return sorted(set(re.findall(pattern, MAP.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", names(rf"`((?:{PACKAGES})\.[\w.]+)`"))
def test_symbol_exists(name):
    parts = name.split(".")
    found = importlib.import_module("instructgpt_hf")
    for place, part in enumerate(parts):
        try:
            found = importlib.import_module("instructgpt_hf." + ".".join(parts[: place + 1]))
        except ModuleNotFoundError:
            fields = {item.name for item in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
            assert hasattr(found, part) or part in fields, f"{name}: no {part}"
            found = getattr(found, part, None)


@pytest.mark.parametrize("path", names(r"`(tests/[\w./]+)`"))
def test_file_exists(path):
    assert (ROOT / path).is_file()


def test_the_map_was_read():
    assert len(names(rf"`((?:{PACKAGES})\.[\w.]+)`")) > 40
