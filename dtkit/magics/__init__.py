"""The notebook's face: parse a line, call the session, show the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.magics.attaching import DistOrphanMagics, is_restarting
from dtkit.magics.awaiting import AWAIT_NAME, rewrite
from dtkit.magics.carrying import DistObjectMagics
from dtkit.magics.looking import DistLookMagics
from dtkit.magics.opening import DistMagics
from dtkit.magics.repairing import DistRepairMagics
from dtkit.magics.running import DistCellMagics
from dtkit.session_core import Registry

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["MAGICS", "load", "unload"]

MAGICS = (
    DistMagics,
    DistCellMagics,
    DistObjectMagics,
    DistLookMagics,
    DistOrphanMagics,
    DistRepairMagics,
)


def load(shell: InteractiveShell) -> None:
    """Register the magics with a shell; harmless when they are there."""
    if hasattr(shell, AWAIT_NAME):
        return
    cells = DistCellMagics(shell)
    shell.register_magics(*(cells if made is DistCellMagics else made for made in MAGICS))
    setattr(shell, AWAIT_NAME, cells.run_cell_async)
    shell.input_transformers_cleanup.append(rewrite)
    Registry.is_restarting = staticmethod(is_restarting)


def unload(shell: InteractiveShell) -> None:
    """Take the magics away again; an open session stays open."""
    if not hasattr(shell, AWAIT_NAME):
        return
    delattr(shell, AWAIT_NAME)
    shell.input_transformers_cleanup.remove(rewrite)
    registered = shell.magics_manager.magics
    for made in MAGICS:
        for kind, names in made.magics.items():
            for name in names:
                registered[kind].pop(name, None)
