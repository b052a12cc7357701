"""tqdm's bars on ranks, in a process of their own, since imports last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dtkit

BARS = """
import io, sys, warnings
import ipykernel.zmqshell  # what tqdm takes for a notebook with widgets
warnings.simplefilter("error")
from dtkit.engine.process.progressbars import install
install()
install()
import tqdm.auto, tqdm.notebook
for kind in (tqdm.auto.tqdm, tqdm.notebook.tqdm, tqdm.notebook.tqdm_notebook):
    text = io.StringIO()
    for _ in kind(range(3), file=text):
        pass
    assert "3/3" in text.getvalue(), text.getvalue()
    assert not hasattr(kind, "container")
print(list(tqdm.notebook.tnrange(2, file=text)), len(sys.meta_path))
"""


def test_the_bars_that_notebooks_get_are_text() -> None:
    pytest.importorskip("tqdm")
    path = str(Path(dtkit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", BARS + "assert 'ipywidgets' not in sys.modules"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("[0, 1]")
