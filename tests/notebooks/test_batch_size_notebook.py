"""The tutorial on batch sizes shows the trade-off that it speaks of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from test_notebooks import ROOT, execute, printed

if TYPE_CHECKING:
    from nbformat import NotebookNode


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> NotebookNode:
    """The tutorial, executed; its kernel and its engines are gone."""
    notebook = nbformat.read(ROOT / "notebooks/04_batch_size.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path_factory.mktemp("batches"))
    assert marked.left() == []
    return notebook


def html(notebook: NotebookNode, cell_id: str) -> str:
    """Return the one HTML output that a cell leaves."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    (output,) = cell.outputs
    assert "application/vnd.jupyter.widget-view+json" not in output.data
    return str(output.data["text/html"])


@pytest.mark.timeout(600)
def test_the_noise_scale_grows_and_places_the_batch(batches: NotebookNode) -> None:
    text = printed(batches, "noise")
    ((first, last),) = re.findall(r"(\d+) samples in the beginning, (\d+) in the end", text)
    assert 0 < int(first) < int(last)
    assert "batch of 16 is " in text
    assert "for a gradient noise scale of about" in text


def test_small_batches_are_better_at_equal_samples(batches: NotebookNode) -> None:
    found = re.findall(r"batch_size=(\d+): (\d+) steps, loss ([\d.]+)", printed(batches, "records"))
    assert [(int(size), int(steps)) for size, steps, _ in found] == [(8, 678), (64, 90), (256, 24)]
    losses = [float(loss) for *_, loss in found]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1] / 3
    shown = html(batches, "sweep")
    assert shown.count("✔ finished") == 3
    assert "alt=" in shown


def test_the_batch_is_searched_until_the_data_end(batches: NotebookNode) -> None:
    shown = html(batches, "tune_batch")
    assert "the largest that fits is 512" in shown
    assert "more than the data" in shown


def test_the_learning_rate_is_found(batches: NotebookNode) -> None:
    assert "the loss falls fastest" in html(batches, "tune_lr")
    (rate,) = re.findall(r"at a learning rate of ([\d.e+-]+)", printed(batches, "proposals"))
    assert 0.01 < float(rate) < 20
