"""HostCluster: the processes of a session on this host, whoever started them."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from dtkit.cluster.placement import Slot
from dtkit.errors import InvalidInputError
from dtkit.guard.processes import Identity, end, family
from dtkit.guard.record import remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from dtkit.cluster.engines import Engines
    from dtkit.guard.record import SessionRecord

__all__ = ["HostCluster"]

_STOP_TIMEOUT_S = 2.0
_LOG_LINES = 20


class HostCluster:
    """Knows every process of a session by pid and start time, and ends them.

    Args:
        record: the session's; what changes in it is written down at once.
    """

    engines: Engines
    on_breakdown: Callable[[], None]
    """Called, on a thread of its own, when the engines cannot be reached any more."""

    def __init__(self, record: SessionRecord) -> None:
        self.on_breakdown = self.stop
        self.record = record
        record.write()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where each rank lives."""
        return tuple(Slot(**slot) for slot in self.record.slots)

    @property
    def dir(self) -> Path:
        """The session's folder: keys, logs, and its record."""
        return self.record.dir

    def stop(self, *, is_hurried: bool = False) -> None:
        """End every process of the session and remove its folder; safe to call twice.

        Args:
            is_hurried: kill at once. An engine in a collective does not hear a
                SIGTERM, and a notebook that is being shut down has two seconds
                before it is killed itself.
        """
        self.leave()
        # A SIGTERM lets engines run their exit handlers; what is then still there
        # is killed. The guardian goes last: until then it would finish this for us.
        end(family(self.record.processes), grace_s=0.0 if is_hurried else _STOP_TIMEOUT_S)
        guardian = self.record.guardian
        if guardian is not None:
            end([guardian], grace_s=0.0)
        remove(self.dir)

    def replace(self, ranks: Sequence[int]) -> None:
        """End the engines of these ranks, and start new ones under the same ids.

        Raises:
            InvalidInputError: another kernel started them, with an environment of its own.
        """
        msg = (
            f"rank {', '.join(map(str, ranks))}: the engines were started by an earlier kernel, "
            "and only that one can start more; %dist_shutdown, then %dist_init"
        )
        raise InvalidInputError(msg)

    def leave(self) -> None:
        """Disconnect; the session lives on for its lease."""
        if hasattr(self, "engines"):
            self.engines.close()

    def remember(self, pids: Iterable[int]) -> None:
        """Write down that these processes, and those below them, belong to the session."""
        found = family(filter(None, map(Identity.of, pids)))
        known = {i: None for i in (*self.record.processes, *found) if i.is_alive}
        self.record = replace(self.record, processes=tuple(known))
        with contextlib.suppress(FileNotFoundError):  # the session has ended already
            self.record.write()

    def pids(self) -> list[int]:
        """Return the pids of every live process of the session, children included."""
        guardian = self.record.guardian
        roots = (*self.record.processes, *((guardian,) if guardian else ()))
        return [process.pid for process in family(roots)]

    def log_tail(self, engine: int, num_lines: int = _LOG_LINES) -> str:
        """Return the last lines of an engine's log."""
        logs = sorted((self.dir / "log").glob(f"ipengine-*-{engine}.log"))
        text = "".join(path.read_text(errors="replace") for path in logs)
        return "\n".join(text.splitlines()[-num_lines:])

    def post_guardian(self) -> None:
        """Start the process that ends the session if its driver goes and nobody comes."""
        log = self.dir / "guardian.log"
        nothing = os.open(os.devnull, os.O_RDONLY)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "dtkit.guard", str(self.dir)],
                dict(os.environ),
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, nothing, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,  # what ends the kernel and its process group must not end it
            )
        finally:
            os.close(nothing)
            os.close(output)
        self.record = replace(self.record, guardian=Identity.of(pid))
        self.record.write()
