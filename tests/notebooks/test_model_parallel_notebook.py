"""The tutorial on models over several ranks runs as it is, and says what it promises."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from build_notebook import execute  # noqa: E402  tools/ is no package

if TYPE_CHECKING:
    from nbformat import NotebookNode


def printed(notebook: NotebookNode, cell_id: str) -> str:
    """Return all text that a cell shows."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    )


@pytest.mark.timeout(600)
def test_all_ways_have_one_curve_and_come_back_whole(tmp_path: Path, marked: Any) -> None:
    notebook = nbformat.read(ROOT / "notebooks/05_model_parallel.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path)
    assert marked.left() == []
    (shard,) = [cell for cell in notebook.cells if cell.id == "shard"]
    assert "sharded over 4 ranks" in shard.outputs[0].data["text/html"]
    (pipe,) = [cell for cell in notebook.cells if cell.id == "pipe"]
    assert "pipeline of 4 stages" in pipe.outputs[0].data["text/html"]
    assert "rank 3 has (128, 64) of (512, 64)" in printed(notebook, "parts")
    (tensor,) = [cell for cell in notebook.cells if cell.id == "tensor"]
    assert "4 layers divided" in tensor.outputs[0].data["text/html"]
    assert "0.weight: rank 3 has (128, 64) of (512, 64)" in printed(notebook, "tensor-parts")
    errors = re.findall(r"at most (\S+) from", printed(notebook, "same"))
    assert len(errors) == 3
    assert all(float(error) < 1e-4 for error in errors)
    (accuracy,) = re.findall(r"Sequential .* accuracy (0\.\d+|1\.0+)", printed(notebook, "use"))
    assert float(accuracy) > 0.95
