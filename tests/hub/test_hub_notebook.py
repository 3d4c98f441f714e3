"""The quickstart notebook: clean as stored, and runs from top to bottom in its smoke mode."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "notebooks" / "quickstart.ipynb"


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_stored_without_outputs() -> None:
    import nbformat

    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


def test_installs_first_and_guards_what_needs_an_account() -> None:
    sources = ["".join(cell["source"]) for cell in code_cells()]
    assert "%pip install" in sources[0] and "find_spec" in sources[0]
    for source in sources:
        if "notebook_login" in source or "push_run" in source:
            assert source.startswith("if PUSH:")
    parameters = [cell for cell in code_cells() if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("instructgpt_hf.pipeline") is None, reason="needs instructgpt_hf.pipeline"
)
def test_runs_in_smoke_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    # The kernel is this interpreter, whatever kernels are installed.
    kernel = tmp_path / "jupyter" / "kernels" / "this-python"
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": launch, "display_name": "this Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    settings = {
        "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "NB_SMOKE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="this-python", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("win rate" in output.get("data", {}).get("text/markdown", "") for output in outputs)
    for stage in ("sft", "reward", "ppo-ptx"):
        assert (tmp_path / "runs" / "smoke" / stage / "stage.json").is_file()
