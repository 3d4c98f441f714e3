"""docs/paper-map.md names only symbols and test files that exist."""

import re
from pathlib import Path

import pytest
from helpers.symbols import assert_symbol_exists

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs" / "paper-map.md"
PACKAGES = "artifacts|config|data|evaluation|functional|lab|models|trainers"


def names(pattern):
    return sorted(set(re.findall(pattern, MAP.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", names(rf"`((?:{PACKAGES})\.[\w.]+)`"))
def test_symbol_exists(name):
    assert_symbol_exists(name)


@pytest.mark.parametrize("path", names(r"`(tests/[\w./]+)`"))
def test_file_exists(path):
    assert (ROOT / path).is_file()


def test_the_map_was_read():
    assert len(names(rf"`((?:{PACKAGES})\.[\w.]+)`")) > 40
