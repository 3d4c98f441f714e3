"""Import direction: a module imports its own layer or lower (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import instructgpt_hf

PACKAGE = Path(instructgpt_hf.__file__).parent
# A module imports its own layer or those before it.
LAYERS = [
    "errors",
    "artifacts",
    "lab",
    "metric_register",
    "functional",
    "_compat",
    "config",
    "hub",
    "data",
    "models",
    "trainers",
    "evaluation",
    "stages",
    "pipeline",
    "cli",
]
NEVER = {
    ("evaluation", "trainers"),
    ("trainers", "hub"),
    ("models", "hub"),
    ("data", "hub"),
    ("hub", "config"),
}
LIBRARIES = {"transformers", "trl", "peft", "datasets", "accelerate"}
STANDARD_LIBRARY_ONLY = (
    *("artifacts.py", "errors.py", "metric_register.py"),
    *(f"config/{name}.py" for name in ("catalog", "data", "fields", "ranges", "rules")),
)
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


@pytest.mark.parametrize("file", STANDARD_LIBRARY_ONLY)
def test_some_modules_use_the_standard_library_only(file):
    for name in imports(PACKAGE / file):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top in ("instructgpt_hf", "__future__"), name


@pytest.mark.parametrize("layer", ["data", "lab", "evaluation", "hub"])
def test_trl_trainers_stay_outside(layer):
    """Reading data, the lab, measuring and publishing need no trainer, TRL's or ours."""
    for path in (PACKAGE / layer).rglob("*.py"):
        for name in imports(path):
            assert not re.match(r"instructgpt_hf\.trainers|trl\.\w*[Tt]rainer|trl\.trainer", name), f"{path}: {name}"


def import_graph():
    """Module -> the modules of the package that it imports anywhere, also inside functions and for annotations."""
    names = {module_name(path) for path in MODULES}
    return {module_name(path): set(modules_of(imports(path), names)) - {module_name(path)} for path in MODULES}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def modules_of(dotted, names):
    for name in dotted:
        # `from package import name` names a module of the package, or what a module holds.
        module = name if name in names else name.rpartition(".")[0]
        if module in names:
            yield module


def test_no_module_imports_itself_through_others():
    graph, circles = import_graph(), []
    assert len(graph) > 100 and "instructgpt_hf.data.splits" in graph["instructgpt_hf.stages.sft"]

    def visit(name, path):
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    done = set()
    for name in sorted(graph):
        visit(name, [])
    assert circles == []


def test_stages_do_not_import_each_other():
    """A stage reads the folders of earlier ones, not their code."""
    graph = import_graph()
    stages = {f"instructgpt_hf.stages.{name}" for name in ("sft", "reward", "ppo")}
    assert stages <= graph.keys()
    assert not {name: graph[name] & stages for name in stages if graph[name] & stages}


def loaded_by(code):
    """Names of the modules that are loaded after running `code` in a fresh interpreter."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("code", ["import instructgpt_hf", "import instructgpt_hf.cli, instructgpt_hf.hub"])
def test_importing_loads_no_torch(code):
    assert not {"torch", "transformers", "trl", "datasets"} & loaded_by(code)


def test_reading_data_loads_no_trainer():
    """Not through other modules either: TRL's trainers take seconds to import."""
    modules = loaded_by("import instructgpt_hf.data.splits")
    assert "instructgpt_hf.data.rankings.schemas" in modules
    assert not {name for name in modules if name.startswith(("trl.trainer", "instructgpt_hf.trainers"))}


def test_every_public_name_resolves():
    for name in instructgpt_hf.__all__:
        assert getattr(instructgpt_hf, name) is not None
