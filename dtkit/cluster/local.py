"""A cluster on this host: one controller and one engine per slot, all on loopback."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dtkit.cluster.engines import Engines
from dtkit.cluster.holding import interrupt_held
from dtkit.cluster.host import POLL_S, START_TIMEOUT_S, HostCluster
from dtkit.guard.record import read_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.guard.record import SessionRecord

__all__ = ["LocalCluster"]


class LocalCluster(HostCluster):
    """Starts the processes of one cluster on this host.

    Args:
        record: the session's, with its folder; one engine is started for each of its slots.
        preload: modules that the engines import while they start.
        on_stage: called with a short text as each stage of the start begins.

    Raises:
        StartError: a process ended or did not answer in time; the text holds its last log lines.
    """

    def __init__(
        self,
        record: SessionRecord,
        *,
        preload: Sequence[str] = (),
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        super().__init__(record, preload)
        self.post_guardian()
        try:
            self.engines: Engines = self._start(on_stage)
            self.keys: dict[str, bytes] = read_keys(self.dir)
        except BaseException:
            self.stop()
            raise

    def _start(self, on_stage: Callable[[str], None]) -> Engines:
        on_stage(f"starting controller and {len(self.slots)} engines")
        starter = self.starter
        # Another thread starts them, and would go on when an interrupt has ended the wait for it.
        with interrupt_held():
            # Engines first: their start is the long pole (they import torch).
            starter.start_engines()
            self.remember(starter.pids())
            starter.start_controller()
            self.remember(starter.pids())
            engines = Engines(starter.connect(), self.slots)
        on_stage("waiting for engines to register")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not engines.are_registered():
            self._check_alive(deadline, [slot.engine for slot in self.slots])
            time.sleep(POLL_S)
        self.remember(starter.pids())
        return engines
