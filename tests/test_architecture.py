"""Import direction: a module imports its own layer or lower (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import instructgpt_hf

PACKAGE = Path(instructgpt_hf.__file__).parent
LAYERS = [
    "errors",
    "artifacts",
    "functional",
    "_compat",
    "config",
    "data",
    "models",
    "trainers",
    "evaluation",
    "hub",
    "lab",
    "stages",
    "pipeline",
    "cli",
]
NEVER = {("evaluation", "trainers"), ("hub", "trainers"), ("hub", "models"), ("hub", "data"), ("lab", "trainers")}
LIBRARIES = {"transformers", "trl", "peft", "datasets", "accelerate"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Dotted names a file imports, relative ones resolved."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(parts[: len(parts) - node.level]) if node.level else []
            base = ".".join(package + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in LAYERS, f"{own}: a new layer; give it its place in LAYERS and docs/architecture.md"
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "instructgpt_hf":
            other = rest.split(".")[0]
            assert (own, other) not in NEVER, f"{own} must not import {other} ({name})"
            if other in LAYERS:
                assert LAYERS.index(other) <= LAYERS.index(own), f"{own} must not import {other} ({name})"
        if own == "functional":
            assert top not in LIBRARIES, f"functional is pure torch ({name})"
        if top == "trl" and own != "_compat":
            assert name.count(".") <= 1, f"{name}: reach TRL's internals through instructgpt_hf._compat"


def test_artifacts_use_the_standard_library_only():
    for file in ("artifacts.py", "errors.py"):
        for name in imports(PACKAGE / file):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top in ("instructgpt_hf", "__future__"), name


@pytest.mark.parametrize("code", ["import instructgpt_hf", "import instructgpt_hf.cli, instructgpt_hf.hub"])
def test_importing_loads_no_torch(code):
    heavy = "{'torch', 'transformers', 'trl', 'datasets'}"
    check = f"{code}; import sys; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_public_name_resolves():
    for name in instructgpt_hf.__all__:
        assert getattr(instructgpt_hf, name) is not None
