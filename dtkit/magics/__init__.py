"""The notebook's face: parse a line, call the session, show the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.magics.awaiting import AWAIT_NAME, rewrite
from dtkit.magics.magics import DistMagics

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["load", "unload"]


def load(shell: InteractiveShell) -> None:
    """Register the magics with a shell; harmless when they are there."""
    if hasattr(shell, AWAIT_NAME):
        return
    magics = DistMagics(shell)
    shell.register_magics(magics)
    setattr(shell, AWAIT_NAME, magics.run_cell_async)
    shell.input_transformers_cleanup.append(rewrite)


def unload(shell: InteractiveShell) -> None:
    """Take the magics away again; an open session stays open."""
    if not hasattr(shell, AWAIT_NAME):
        return
    delattr(shell, AWAIT_NAME)
    shell.input_transformers_cleanup.remove(rewrite)
    registered = shell.magics_manager.magics
    for kind, names in DistMagics.magics.items():
        for name in names:
            registered[kind].pop(name, None)
