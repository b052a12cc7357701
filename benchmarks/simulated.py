"""A session over simulated engines: the driver is real, and what it is sent is too."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from dtkit.cluster.engines import Engines
from dtkit.cluster.host import POLL_S, HostCluster
from dtkit.cluster.placement import Slot
from dtkit.driver.session import Session
from dtkit.guard.record import SessionRecord

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["simulated_session"]


class _SimulatedCluster(HostCluster):
    """A real controller, and a process that stands for all engines.

    Args:
        num_ranks: how many.
        runs_dir: where runs get their folders.
    """

    def __init__(self, num_ranks: int, runs_dir: Path) -> None:
        slots = [Slot(rank, rank, rank, None, 1) for rank in range(num_ranks)]
        super().__init__(
            SessionRecord.new(
                tuple(map(asdict, slots)), "gloo", str(runs_dir), lease_s=0.0, is_strict=True
            )
        )
        self.post_guardian()
        self.starter.start_controller()
        self.engines = Engines(self.starter.connect(), slots)
        file = self.dir / "security" / "ipcontroller-engine.json"
        command = [sys.executable, "-m", "benchmarks.simulator", str(file), str(num_ranks)]
        self._simulator = subprocess.Popen(command)
        self.remember([*self.starter.pids(), self._simulator.pid])
        while not self.engines.are_registered():
            if self._simulator.poll() is not None:
                msg = "the simulated engines have ended"
                raise RuntimeError(msg)
            time.sleep(POLL_S)


def simulated_session(num_ranks: int, runs_dir: Path) -> Session:
    """Open a session of engines that compute nothing; `%%dist_train` and `%%dist` take it."""
    session = Session(_SimulatedCluster(num_ranks, runs_dir))
    session.facts.update(session._group.build())  # noqa: SLF001  as Session.start does
    session._open()  # noqa: SLF001
    return session
