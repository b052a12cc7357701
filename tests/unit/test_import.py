"""`import dtkit` is free: it loads nothing that is slow to load."""

from __future__ import annotations

import subprocess
import sys

SLOW = {"torch", "ipywidgets", "matplotlib", "ipyparallel", "numpy"}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level names in `sys.modules` after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_dtkit_loads_nothing_slow() -> None:
    loaded = loaded_by("import dtkit")
    assert "dtkit" in loaded
    assert loaded & SLOW == set()


def test_a_slow_import_would_be_seen() -> None:
    assert "numpy" in loaded_by("import numpy")
