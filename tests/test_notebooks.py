"""The notebooks in examples/ run, one after the other in one kernel because imports take longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "examples"
PRINTED = {
    "quickstart.ipynb": ("round 3: validation loss", "loss of one sentence", "fedsa-rslora "),
    "drop_in_peft_config.ipynb": ("gamma = 0.8660", "round 2, emotion-1: training loss", "training loss"),
    "own_method.ipynb": ("cautious:Cautious  validation loss",),
}


def printed(notebook: Any) -> str:
    """What the code cells wrote to standard output."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_every_notebook_is_known() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_stored_is_clean(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.get("name") == "stdout" for output in outputs)
    assert all(text in printed(notebook) for text in PRINTED[name])


def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent / "src"))
    notebooks = [nbformat.read(NOTEBOOKS / name, as_version=4) for name in PRINTED]
    joined = nbformat.v4.new_notebook()
    for number, notebook in enumerate(notebooks):
        for cell in notebook.cells:
            cell["id"] = f"{number}-{cell['id']}"
            joined.cells.append(cell)
    NotebookClient(joined, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name, notebook in zip(PRINTED, notebooks, strict=True):
        assert all(text in printed(notebook) for text in PRINTED[name]), name
