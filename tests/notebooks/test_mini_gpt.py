"""The closing tutorial: a language model that is stopped, resumed, pulled, and writes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from test_notebooks import ROOT, execute, printed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(600)
def test_a_small_gpt_is_trained_in_two_goes_and_writes(tmp_path: Path, marked: Any) -> None:
    notebook = nbformat.read(ROOT / "notebooks/10_mini_gpt.ipynb", as_version=4)
    with marked.marking():
        execute(notebook, tmp_path)
    assert marked.left() == []
    assert "gpt stopped after 120 steps" in printed(notebook, "stopped")
    (first, last) = re.findall(
        r"gpt_on finished: held-out loss ([\d.]+) at first, ([\d.]+) at the end",
        printed(notebook, "resumed"),
    )[0]
    assert float(last) < float(first) < 3.2
    written = printed(notebook, "write")
    assert len(written) > 300
    assert "self" in written
