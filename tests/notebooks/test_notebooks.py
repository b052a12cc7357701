"""The tutorials run as they are, say what they promise, and leave nothing behind."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from build_notebook import execute  # noqa: E402  tools/ is no package

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def printed(notebook: NotebookNode, cell_id: str) -> str:
    """Return all text that a cell shows."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    )


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> NotebookNode:
    """The first tutorial, executed; its kernel and its engines are gone."""
    notebook = nbformat.read(ROOT / "notebooks/01_first_run.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path_factory.mktemp("first_run"))
    assert marked.left() == []
    return notebook


@pytest.mark.timeout(600)
def test_the_first_run_reaches_the_accuracy_it_promises(first_run: NotebookNode) -> None:
    (accuracy,) = re.findall(r"test accuracy: (0\.\d+)", printed(first_run, "accuracy"))
    assert float(accuracy) >= 0.95


def test_the_dashboard_is_left_as_a_static_summary(first_run: NotebookNode) -> None:
    (cell,) = [cell for cell in first_run.cells if cell.id == "train"]
    (output,) = cell.outputs
    assert "application/vnd.jupyter.widget-view+json" not in output.data
    html = output.data["text/html"]
    assert "finished" in html
    assert "<img" in html
    assert "alt=" in html
    assert "all ranks" in html
    assert "1 model broadcast, 1 DataLoader sharded (global batch 2 × 32 = 64)" in html
    page, _ = HTMLExporter().from_notebook_node(first_run)
    assert "1 model broadcast" in page


def test_the_history_is_that_of_the_run(first_run: NotebookNode) -> None:
    text = printed(first_run, "run")
    assert "first_run finished after 880 steps" in text
    first, last = re.findall(r"loss: ([\d.]+) at the first step, ([\d.]+) at the last", text)[0]
    assert float(last) < float(first) / 10


@pytest.fixture(scope="module")
def horovod(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> tuple[NotebookNode, Path]:
    """The tutorial on Horovod, executed, and the folder it worked in."""
    notebook = nbformat.read(ROOT / "notebooks/07_horovod.ipynb", as_version=4)
    folder = tmp_path_factory.mktemp("horovod")
    with marked.marking(), pytest.MonkeyPatch.context() as patch:
        # As the .pth file of an installed dtkit does it.
        path = [str(ROOT), str(ROOT / "dtkit/horovod/_path")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        execute(notebook, folder)
    assert marked.left() == []
    return notebook, folder


@pytest.mark.timeout(600)
def test_horovods_cell_trains_unchanged(horovod: tuple[NotebookNode, Path]) -> None:
    notebook, _ = horovod
    (cell,) = [cell for cell in notebook.cells if cell.id == "train"]
    html = cell.outputs[0].data["text/html"]
    assert "hvd.DistributedOptimizer combines its gradients" in html
    assert "sharded" not in html
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", html)]
    assert len(losses) >= 16
    assert losses[-1] < losses[0] / 10


def test_horovods_collectives_say_what_they_promise(horovod: tuple[NotebookNode, Path]) -> None:
    notebook, folder = horovod
    assert "mean of the ranks 0.5, gathered [0, 1, 1]" in printed(notebook, "ops")
    assert "rank 0 has shape [[2]], rank 1 has shape [[3]]" in printed(notebook, "error")
    assert printed(notebook, "run").strip() == "[6.0, 6.0]"
    compile((folder / "lecture.py").read_text(), "lecture.py", "exec")
    assert "training.end()" in printed(notebook, "script")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept_in_the_repository(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> NotebookNode:
    """The tutorial on where the time goes, executed; nothing that it started is left."""
    notebook = nbformat.read(ROOT / "notebooks/08_timeline.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path_factory.mktemp("timeline"))
    assert marked.left() == []
    return notebook


@pytest.mark.timeout(600)
def test_the_timeline_names_the_slow_rank_and_why(timeline: NotebookNode) -> None:
    text = printed(timeline, "timeline")
    assert re.search(r"waits \d\d% of the step .* for rank 1, whose DataLoader takes", text)
    (cell,) = [cell for cell in timeline.cells if cell.id == "timeline"]
    assert {"image/png", "text/html"} <= set(cell.outputs[0].data)
    assert "rank 1 was waited for" in printed(timeline, "trace")
    assert "NEGOTIATE_ALLREDUCE" in printed(timeline, "trace")


def test_two_runs_are_compared_and_the_mended_one_is_faster(timeline: NotebookNode) -> None:
    head, *lines = printed(timeline, "both").splitlines()
    assert head.split() == ["stalled", "mended"]
    (rates,) = [line for line in lines if line.startswith("samples/s")]
    slow, fast = (float(number.replace(",", "")) for number in rates.split()[1:])
    assert fast > slow
    assert {"stalled", "mended"} <= set(printed(timeline, "runs").split())


def test_tensorboard_opens_in_the_notebook(timeline: NotebookNode) -> None:
    assert re.search(r"TensorBoard of .* at http://127.0.0.1:\d+/", printed(timeline, "board"))
    (cell,) = [cell for cell in timeline.cells if cell.id == "board"]
    assert "<iframe" in cell.outputs[0].data["text/html"]


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> NotebookNode:
    """The tutorial of strategies, executed; its kernel and its engines are gone."""
    notebook = nbformat.read(ROOT / "notebooks/06_asynchronous.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path_factory.mktemp("asynchronous"))
    assert marked.left() == []
    return notebook


@pytest.mark.timeout(600)
def test_the_slow_rank_makes_the_fewest_steps_and_staleness_is_counted(
    asynchronous: NotebookNode,
) -> None:
    text = printed(asynchronous, "async_rate")
    steps = dict(re.findall(r"(\d): (\d+)", text.partition("steps by rank: ")[2].splitlines()[0]))
    assert sum(map(int, steps.values())) == 3 * 94  # each batch once an epoch
    assert int(steps["3"]) < min(int(steps[r]) for r in "012")
    counts = re.findall(r"\d+: (\d+)", text.partition("staleness: ")[2])
    assert sum(map(int, counts)) == 3 * 94
    (cell,) = [cell for cell in asynchronous.cells if cell.id == "async"]
    assert 'aria-label="staleness of steps"' in cell.outputs[0].data["text/html"]


def test_each_strategy_ends_with_ranks_that_are_equal(asynchronous: NotebookNode) -> None:
    text = printed(asynchronous, "check")
    assert "model: 4 parameters: equal on all ranks" in text
    assert "disjoint, all 1,500 of them" in text
    (accuracy,) = set(re.findall(r"0\.\d+", printed(asynchronous, "accuracy")))
    assert float(accuracy) > 0.8
    assert "divergence: " in printed(asynchronous, "gossip_rate")
    assert "weights averaged every 8 steps" in printed(asynchronous, "rounds_rate")
