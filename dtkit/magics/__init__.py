"""The notebook's face: parse a line, call the session, show the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.driver.registry import Registry
from dtkit.driver.waiting import drive_async
from dtkit.magics import completion
from dtkit.magics.arguments import usage_errors
from dtkit.magics.attaching import is_restarting
from dtkit.magics.awaiting import AWAIT_NAME, rewrite
from dtkit.magics.registry import MAGICS, PARSERS, document
from dtkit.magics.running import DistCellMagics
from dtkit.magics.tuning import DistTuneMagics

if TYPE_CHECKING:
    from collections.abc import Callable

    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["MAGICS", "PARSERS", "load", "unload"]


def load(shell: InteractiveShell) -> None:
    """Register the magics with a shell; harmless when they are there."""
    if hasattr(shell, AWAIT_NAME):
        return
    cells, trials = DistCellMagics(shell), DistTuneMagics(shell)
    ready: dict[Any, Any] = {DistCellMagics: cells, DistTuneMagics: trials}
    shell.register_magics(*(ready.get(made, made) for made in MAGICS))
    prepare: dict[str, Callable[..., Any]] = {
        "dist_train": cells.training,
        "dist": cells.running,
        "dist_sweep": trials.sweeping,
        "dist_tune": trials.tuning,
    }

    async def run_cell(name: str, line: str, cell: str) -> None:
        prepared = usage_errors(prepare[name])(line, cell)
        if prepared is not None:  # None: help was asked for, or it goes on in the background
            await drive_async(*prepared)

    setattr(shell, AWAIT_NAME, run_cell)
    shell.input_transformers_cleanup.append(rewrite)
    document()
    completion.install(shell)
    Registry.is_restarting = staticmethod(is_restarting)


def unload(shell: InteractiveShell) -> None:
    """Take the magics away again; an open session stays open."""
    if not hasattr(shell, AWAIT_NAME):
        return
    delattr(shell, AWAIT_NAME)
    shell.input_transformers_cleanup.remove(rewrite)
    completion.uninstall(shell)
    registered = shell.magics_manager.magics
    for made in MAGICS:
        for kind, names in made.magics.items():
            for name in names:
                registered[kind].pop(name, None)
