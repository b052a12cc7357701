"""The guardian of one session: `python -m dtkit.guard FOLDER`, started with the cluster.

It belongs to nobody. While the session's kernel lives it does nothing. Once
that has gone it waits for another kernel to take the session over; after the
lease it ends every process of the session, and itself. A run that goes on
holds the lease up, unless the session was started with a strict one.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from dtkit.guard.processes import end, family
from dtkit.guard.record import SessionRecord, active_ranks, locked, remove

__all__ = ["Guardian", "main"]

_TICK_S = 0.5
_GRACE_S = 2.0


class Guardian:
    """Decides, from what it finds at each look, whether a session is to end.

    Args:
        folder: the session's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle_since_s: float | None = None
        self._last: SessionRecord | None = None

    def look(self, now_s: float) -> bool:
        """Look at the session, end it if it is time, and return whether it has ended.

        Args:
            now_s: seconds that do not count while the machine sleeps.
        """
        try:
            with locked(self._folder):
                return self._look(now_s)
        except OSError:  # gone, or something else is there now
            return self._look_without_folder(now_s)

    def _look(self, now_s: float) -> bool:
        record = SessionRecord.read(self._folder)
        if record is None:
            return self._look_without_folder(now_s)
        self._last = record
        if not record.is_orphan or (not record.is_strict and active_ranks(self._folder)):
            self._count_from(record, None)
            return False
        if self._idle_since_s is None:
            self._count_from(record, now_s)
        idle_s = now_s - (self._idle_since_s or 0.0)
        if record.is_alive and idle_s < record.lease_s:
            return False
        end(family(record.processes), grace_s=_GRACE_S if record.lease_s else 0.0)
        remove(self._folder)
        return True

    def _look_without_folder(self, now_s: float) -> bool:
        """Go on without the folder: it was removed by the session's end, or by somebody else.

        Who cleans up a temporary directory ends no session, and its kernel can put the folder
        back. Without a kernel nobody can take the session over any more; the lease holds all
        the same, since whether a run goes on cannot be told.
        """
        record = self._last
        if record is None or not record.is_alive:
            return True
        if not record.is_orphan:
            self._idle_since_s = None
            return False
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        if now_s - self._idle_since_s < record.lease_s:
            return False
        end(family(record.processes), grace_s=_GRACE_S if record.lease_s else 0.0)
        return True

    def _count_from(self, record: SessionRecord, since_s: float | None) -> None:
        if self._idle_since_s != since_s:
            self._idle_since_s = since_s
            record.note_idle(None if since_s is None else time.time())


def main() -> None:
    """Watch until the session has ended."""
    # Whoever has it in its process group: it is not meant for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guardian = Guardian(Path(sys.argv[1]))
    while not guardian.look(time.monotonic()):
        time.sleep(_TICK_S)


if __name__ == "__main__":
    main()
