"""The tutorial on recipes shows what each flag buys and costs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from test_notebooks import ROOT, execute, printed

if TYPE_CHECKING:
    from nbformat import NotebookNode


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, marked: Any) -> NotebookNode:
    """The tutorial, executed; its kernel and its engines are gone."""
    notebook = nbformat.read(ROOT / "notebooks/03_recipes.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path_factory.mktemp("recipes"))
    assert marked.left() == []
    return notebook


@pytest.mark.timeout(600)
def test_a_precision_costs_little_loss(recipes: NotebookNode) -> None:
    """The first test to run: it executes the notebook."""
    found = re.findall(r"(\w+): loss ([\d.]+), finished", printed(recipes, "amp-records"))
    assert [name for name, _ in found] == ["off", "bf16", "fp16"]
    off, *others = (float(loss) for _, loss in found)
    assert all(loss < 1.03 * off for loss in others)


def test_accumulation_sends_a_quarter_and_makes_fewer_steps(recipes: NotebookNode) -> None:
    text = printed(recipes, "accumulate-records")
    found = re.findall(r"--accumulate (\d): (\d+) steps, (\d+) MB sent in all, loss ([\d.]+)", text)
    (_, steps, sent, loss), (_, few, little, more_loss) = (map(float, row) for row in found)
    assert few == pytest.approx(steps / 4, abs=2)
    assert little == pytest.approx(sent / 4, rel=0.1)
    assert more_loss > loss


def test_compression_saves_what_it_says(recipes: NotebookNode) -> None:
    text = printed(recipes, "compress-records")
    found = re.findall(r"(\S+): ([\d.]+) times fewer bytes, loss ([\d.]+)", text)
    times = {name: float(number) for name, number, _ in found}
    assert times["none"] == 1
    assert times["fp16"] == pytest.approx(2, rel=0.05)
    assert times["int8"] == pytest.approx(4, rel=0.05)
    assert times["sign"] > 5  # more in its first 200 steps, which are most of these
    assert times["powersgd:4"] > 10
    losses = {name: float(loss) for name, _, loss in found}
    assert max(losses[name] for name in ("fp16", "int8", "topk:0.05")) < 1.05 * losses["none"]
    assert max(losses.values()) < 3.0  # powersgd lags: chance is 4.5


def test_flags_combine_and_nonsense_is_refused(recipes: NotebookNode) -> None:
    text = printed(recipes, "refused")
    assert "--compress int8 changes how gradients are averaged, --manual" in text
    assert "--amp bf16 --accumulate 2 --compress int8: finished after " in text
    assert re.search(r", (3\.9|4\.0) times fewer bytes", text)
