"""Runs docs/notebook.ipynb from top to bottom and keeps its outputs, with small plots: `python scripts/notebook.py`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with what its cells give now; the first one that raises ends it with CellExecutionError."""
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": f"{ROOT}"}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # warnings name folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4)), NOTEBOOK)
    sys.exit(0)
