"""A session that one test module hands on to the next: engines are started once for many.

To start two takes three seconds, and as much again until all is loaded that a run loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import dtkit
from dtkit.guard.processes import Identity

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Handover"]

FRESH = """
import random
import numpy, sklearn.datasets, tensorboard, torch, torch._dynamo
assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
assert torch.get_default_dtype() is torch.float32
torch.manual_seed(67280421310721)  # what torch starts with
numpy.random.seed(0)
random.seed(0)
get_ipython().run_line_magic("reset", "-f")
import gc
from torch.distributed.device_mesh import DeviceMesh
from dtkit.engine.living import living
gc.collect()
if not living(DeviceMesh):  # they are there for the life of the process, and to be found
    gc.freeze()
get_ipython().run_line_magic("reset", "-f")
"""
"""Leaves no name of the module before, and random numbers that it has no part in.

What modules are loaded is frozen, as an engine does by itself when nobody runs a cell in its
first seconds: else every run and every rebuild goes through it.
"""


class Handover:
    """Has at most one session open, and gives it out as good as new.

    Args:
        owned_pids: takes the processes of what is open.
    """

    def __init__(self, owned_pids: set[int]) -> None:
        self._owned_pids = owned_pids
        self._session: dtkit.Session | None = None
        self._pids: set[int] = set()

    def take(self, num_ranks: int, runs_dir: Path) -> dtkit.Session:
        """Return a session without names, in a group of its own, with a folder for its runs."""
        if self._session is not None and self._session.world_size != num_ranks:
            self.close()
        session = self._session
        if session is None:
            session = self._session = dtkit.Session.start(num_ranks, runs_dir=runs_dir)
            self._pids = set(session.pids())
            self._owned_pids |= self._pids
        session.runs_dir = runs_dir
        session.execute(FRESH)
        session.reset_group()  # which brings `rank` and the like back
        return session

    def leave(self, *, is_wanted: bool) -> None:
        """Keep the session for the next module, if one wants it and it has all of its engines."""
        if not (is_wanted and self._is_whole()):
            self.close()

    def _is_whole(self) -> bool:
        session = self._session
        return (
            session is not None
            and session is dtkit.current_session()
            and {status.pid for status in session.status()} <= self._pids
            and all(status.state == "idle" for status in session.status())
        )

    def close(self) -> None:
        """End the session; no process of it is left."""
        if self._session is None:
            return
        session, self._session = self._session, None
        pids = self._pids | set(session.pids())
        session.close()
        self._owned_pids.difference_update(pids)
        assert not [pid for pid in pids if Identity.of(pid)]
