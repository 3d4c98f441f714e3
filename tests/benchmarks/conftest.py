"""The scripts and their packages are importable, as when a script is run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def small_model(make_policy, tokenizer, tmp_path):
    """Folder of a random model with its tokenizer."""
    folder = tmp_path / "model"
    make_policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
