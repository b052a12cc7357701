"""The guardian of one session: `python -m dtkit.guard FOLDER`, started with the cluster.

It belongs to nobody. While the session's kernel lives it does nothing. Once
that has gone it waits for another kernel to take the session over; after the
lease it ends every process of the session, and itself. A run that goes on
holds the lease up, unless the session was started with a strict one. Without a
controller nobody can take the session over, and it ends with its run.

SIGTERM: the session ends at once if its kernel is gone or goes now; else only
the guardian does, and the engines start another when there is need of one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtkit.guard.processes import end, family
from dtkit.guard.record import SessionRecord, active_ranks, locked, remove

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Guardian", "main", "watch"]

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

    def look(self, now_s: float, *, is_told: bool = False) -> bool:
        """Look at the session, end it if it is time, and return whether it has ended.

        Args:
            now_s: seconds that do not count while the machine sleeps.
            is_told: end it now, unless a kernel has it.
        """
        try:
            with locked(self._folder):
                return self._look(now_s, is_told=is_told)
        except OSError:  # gone, or something else is there now
            return self._look_without_folder(now_s, is_told=is_told)

    def _look(self, now_s: float, *, is_told: bool) -> bool:
        record = SessionRecord.read(self._folder)
        if record is None:
            return self._look_without_folder(now_s, is_told=is_told)
        self._last = record
        is_training = not (record.is_strict or is_told) and bool(active_ranks(self._folder))
        if not record.is_orphan or is_training:
            self._count_from(record, None)
            return False
        if self._idle_since_s is None:
            self._count_from(record, now_s)
        if record.is_alive and not is_told and not self._is_over(record, now_s):
            return False
        _end_all(record)
        remove(self._folder)
        return True

    def _look_without_folder(self, now_s: float, *, is_told: bool) -> bool:
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
        if not is_told and not self._is_over(record, now_s):
            return False
        _end_all(record)
        return True

    def _is_over(self, record: SessionRecord, now_s: float) -> bool:
        idle_s = now_s - (self._idle_since_s or 0.0)
        return record.is_headless or idle_s >= record.lease_s

    def _count_from(self, record: SessionRecord, since_s: float | None) -> None:
        if self._idle_since_s != since_s:
            self._idle_since_s = since_s
            record.note_idle(None if since_s is None else time.time())


def watch(guardian: Guardian, before_look: Callable[[float], None] = lambda _now_s: None) -> None:
    """Look at a session until it has ended, or until told by SIGTERM to leave it to its kernel."""
    # Whoever has it in its process group: it is not meant for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    told_s: float | None = None
    while True:
        now_s = time.monotonic()
        before_look(now_s)
        if guardian.look(now_s, is_told=told_s is not None):
            return
        # Who ends a kernel and its guardian ends them one after the other.
        if told_s is not None and now_s - told_s > _GRACE_S:
            return
        if signal.sigtimedwait([signal.SIGTERM], _TICK_S) is not None and told_s is None:
            told_s = time.monotonic()


def _end_all(record: SessionRecord) -> None:
    # This process may be a child of an engine, which has started it.
    found = [process for process in family(record.processes) if process.pid != os.getpid()]
    end(found, grace_s=_GRACE_S if record.lease_s else 0.0)


def main() -> None:
    """Watch until the session has ended."""
    watch(Guardian(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
