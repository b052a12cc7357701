"""Loading modules that will be needed soon, while this engine has nothing to do.

On the main thread: a thread of its own would meet a cell that imports the same
package half way, and Python then hands one of them half a module.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
from typing import TYPE_CHECKING

from dtkit.engine.process.agent import agent

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["begin"]

_DELAY_S = 0.5
"""A cell that comes right after the start, as in "Run all cells", goes first."""


def begin(modules: Sequence[str]) -> None:
    """Import the modules one by one; a cell that comes meanwhile waits for one of them at most.

    What is loaded is frozen: a million objects of torch's that live for ever
    need not be gone through at every garbage collection, nor in search of models.
    """
    loop = asyncio.get_running_loop()
    waiting = list(modules)
    _freeze()

    def load_next() -> None:
        if not agent().is_busy:
            name = waiting.pop(0)
            is_collecting = gc.isenabled()
            gc.disable()  # it would go through what is loaded again and again: a fifth of the time
            try:
                importlib.import_module(name)
            except Exception:  # whoever needs it will say so
                logging.getLogger("dtkit").exception("%s cannot be loaded", name)
            finally:
                if is_collecting:
                    gc.enable()
            if not waiting:
                _freeze()
        if waiting:
            loop.call_later(_DELAY_S if agent().is_busy else 0.0, load_next)

    loop.call_later(_DELAY_S, load_next)


def _freeze() -> None:
    if not agent().has_run_cells:  # the user's objects stay where they can be collected
        gc.freeze()
