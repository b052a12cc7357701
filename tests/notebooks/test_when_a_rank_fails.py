"""The drill: one rank raises, one is killed, all are stopped, and the notebook goes on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from test_notebooks import ROOT, execute, printed

if TYPE_CHECKING:
    from nbformat import NotebookNode

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> NotebookNode:
    """The tutorial, executed; its kernel and its engines are gone."""
    notebook = nbformat.read(ROOT / "notebooks/02_when_a_rank_fails.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path_factory.mktemp("drill"))
    assert marked.left() == []
    return notebook


def error_of(notebook: NotebookNode, cell_id: str) -> str:
    """Return what a failed cell shows of its error."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    (error,) = [output for output in cell.outputs if output.output_type == "error"]
    return ANSI.sub("", "\n".join(error.traceback))


def losses(notebook: NotebookNode, cell_id: str) -> list[float]:
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    html = "".join(o.data.get("text/html", "") for o in cell.outputs if "data" in o)
    return [float(text) for text in re.findall(r"loss (\d+\.\d+)", html)]


@pytest.mark.timeout(600)
def test_a_rank_that_raises_is_the_only_one_shown(drill: NotebookNode) -> None:
    text = error_of(drill, "raise")
    assert text.startswith("── rank 1, cell line 6 ──")
    assert text.count("ValueError: a bad batch") == 1
    assert "rank 0 was in all_reduce (cell line 7) and was released" in text
    assert text.endswith("group rebuilt; state kept")


def test_a_killed_rank_is_named_and_comes_back_with_its_state(drill: NotebookNode) -> None:
    text = error_of(drill, "kill")
    assert "rank 1" in text
    assert "was killed by SIGKILL" in text
    assert "%dist_restart 1" in text
    assert "model, optimizer equal on all ranks" in printed(drill, "restart")


def test_training_goes_on_where_it_was(drill: NotebookNode) -> None:
    first, second, third = (losses(drill, cell)[-1] for cell in ("train", "kept", "again"))
    assert first > second > third


def test_replicas_are_equal_in_the_end(drill: NotebookNode) -> None:
    text = printed(drill, "equal")
    assert len(re.findall(r"weights -?\d", text)) == 1  # one text of all ranks
    assert "rank 0: 0\nrank 1: 1" in text


def test_what_was_stuck_is_stopped(drill: NotebookNode) -> None:
    assert "stopping now" in printed(drill, "stop")
    assert "'stopped'" in printed(drill, "wait")
    assert "all ranks: 2" in printed(drill, "end")
