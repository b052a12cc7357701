"""The guardian of a session over several hosts: `python -m … FOLDER`.

As `dtkit.guard` does, it ends a session that nobody takes over. Whether a run goes on is
known on the hosts: once the kernel is gone it asks their agents, and notes it here, where
a later kernel finds it too. What their ranks have written it brings here meanwhile, as the
kernel would have done at the run's end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ipyparallel as ipp

from dtkit.cluster.engines import Engines
from dtkit.cluster.placement import Slot
from dtkit.cluster.remote.agent import FIRST_ENGINE
from dtkit.cluster.remote.collecting import bring_files, bring_states
from dtkit.errors import DtkitError
from dtkit.guard.__main__ import Guardian, watch
from dtkit.guard.record import RankRun, SessionRecord, active_ranks, locked

__all__ = ["main"]

_ASK_S = 5.0
_CONNECT_TIMEOUT_S = 10.0


class _Hosts:
    """The agents of a session's hosts, asked now and then while no kernel has it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._agents: Engines | None = None
        self._next_s = 0.0
        self._brought: set[str] = set()

    def look(self, now_s: float) -> None:
        """Note which runs go on; lets go of the controller when a kernel has come."""
        record = SessionRecord.read(self._folder)
        if record is None or not record.is_orphan or not record.is_alive:
            self._disconnect()
        elif now_s >= self._next_s:
            self._next_s = now_s + _ASK_S
            try:
                agents = self._connected(record)
                bring_states(agents, self._folder, record.processes[0])
                with locked(self._folder):  # who takes the session over appends to the same files
                    self._bring_files(agents)
            except (OSError, TimeoutError, DtkitError) as error:
                # Tried again; the lease goes on meanwhile.
                print(f"the hosts cannot be asked: {error}", file=sys.stderr)  # noqa: T201  a log
                self._disconnect()

    def _bring_files(self, agents: Engines) -> None:
        record = SessionRecord.read(self._folder)
        if record is None or not record.is_orphan:
            return
        is_over = not active_ranks(self._folder)
        for folder in {run.dir for run in RankRun.read_all(self._folder).values()} - self._brought:
            bring_files(agents, Path(folder), is_over=is_over)
            if is_over:
                self._brought.add(folder)

    def _connected(self, record: SessionRecord) -> Engines:
        if self._agents is None:
            client = ipp.Client(
                connection_info=str(self._folder / "security" / "ipcontroller-client.json"),
                timeout=_CONNECT_TIMEOUT_S,
            )
            numbers = sorted({slot["agent"] for slot in record.slots})
            slots = [Slot(n, FIRST_ENGINE + n, 0, None, 1) for n in numbers]
            self._agents = Engines(client, slots)
        return self._agents

    def _disconnect(self) -> None:
        if self._agents is not None:
            self._agents.close()
            self._agents = None


def main() -> None:
    """Watch until the session has ended."""
    folder = Path(sys.argv[1])
    watch(Guardian(folder), _Hosts(folder).look)


if __name__ == "__main__":
    main()
