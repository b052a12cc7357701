"""Interrupts of a cell: each rank gets one, once it has come to the cell."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.cluster import Engines

__all__ = ["Interrupts"]

_TIMEOUT_S = 1.0


class Interrupts:
    """Sends SIGINT to ranks that are in the cell: before it, nobody would be interrupted.

    Args:
        engines: those of the ranks.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._sent: set[int] = set()

    def send(self, running: Sequence[int]) -> bool:
        """Interrupt those that have not been; return whether all have now.

        Args:
            running: the ranks that have not ended the cell; some may not have begun it.
        """
        due = [rank for rank in running if rank not in self._sent]
        places = self._engines.control("where", ranks=due, timeout_s=_TIMEOUT_S)
        # One that does not answer is in C code, and so in the cell.
        begun = [rank for rank in due if places.get(rank, {}).get("state") != "idle"]
        self._engines.signal(signal.SIGINT, begun)
        self._sent.update(begun)
        return begun == due
