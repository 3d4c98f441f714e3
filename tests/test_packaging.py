"""The package as users get it: built, installed into an empty folder, used from outside the checkout."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from instructgpt_hf.config.rules import VLLM

ROOT = Path(__file__).parents[1]
RECIPES = ["pythia-1.4b-6.9b", "qwen3-qlora-t4", "smollm2-135m", "tiny-cpu"]


def run(*command, cwd, **environment):
    # The checkout must not be importable.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_code_recipes_base_model_templates_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "instructgpt_hf/py.typed",
        *(f"instructgpt_hf/recipes/{name}/README.md" for name in RECIPES),
        *(f"instructgpt_hf/recipes/{name}/{stage}.yaml" for name in RECIPES for stage in ("sft", "reward", "ppo")),
        *(
            f"instructgpt_hf/{path.relative_to(ROOT / 'instructgpt_hf').as_posix()}"
            for pattern in ("**/*.py", "lab/base_model/*", "hub/templates/*")
            for path in (ROOT / "instructgpt_hf").glob(pattern)
        ),
    }
    assert not expected - names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("instructgpt_hf/", "instructgpt_hf-")) for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_sdist_holds_what_builds_and_tests_the_package(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "recipes/tiny-cpu/ppo.yaml"} <= names
    assert {"tests/conftest.py", "docs/ppo.md", "model_cards/sft.md"} <= names


def test_wheel_works_outside_the_checkout(installed, tmp_path):
    code = (
        "import sys, instructgpt_hf\n"
        "from instructgpt_hf import lab\n"
        "from instructgpt_hf.config.catalog import recipe_folder\n"
        "assert 'torch' not in sys.modules\n"
        "print(instructgpt_hf.__file__, recipe_folder('tiny-cpu'), lab.base_model_path(), sep='\\n')"
    )
    places = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(installed) for place in places)


def test_installed_command_lists_and_loads_the_recipes(installed, tmp_path):
    command = installed / "bin" / "instructgpt-hf"
    listed = run(sys.executable, command, "recipes", "list", cwd=tmp_path, PYTHONPATH=str(installed))
    assert [line.split()[0] for line in listed.splitlines()] == RECIPES
    run(sys.executable, command, "recipes", "copy", "tiny-cpu", "mine", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (tmp_path / "mine" / "ppo.yaml").is_file()


def test_the_vllm_extra_is_one_that_trl_supports():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    ours, trls = (
        next(item.specifier for item in map(Requirement, items) if item.name == "vllm")
        for items in (extra, importlib.metadata.requires("trl"))
    )
    assert VLLM in extra, "what an error tells to install"
    versions = [f"0.{minor}.0" for minor in range(20, 40)]
    assert list(ours.filter(versions)) == ["0.29.0", "0.30.0"] == list(trls.filter(["0.29.0", "0.30.0"]))


def test_the_version_script_wants_to_know_which():
    done = subprocess.run([ROOT / ".ci" / "versions"], capture_output=True, text=True)
    assert done.returncode == 2 and "oldest|newest" in done.stdout
