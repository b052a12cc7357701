"""AttachedCluster: engines that an earlier kernel started, taken over by this one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import ipyparallel as ipp

from dtkit.cluster.engines import Engines
from dtkit.cluster.host import HostCluster
from dtkit.errors import InvalidInputError, StartError
from dtkit.guard.record import SessionRecord, locked

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AttachedCluster"]

_CONNECT_TIMEOUT_S = 10.0


class AttachedCluster(HostCluster):
    """Connects to the engines of a session whose kernel is gone.

    Args:
        folder: the session's.

    Raises:
        InvalidInputError: it has ended, or another kernel has it.
        StartError: its controller does not answer.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with locked(folder):
                self._found = _free_record(folder)
                super().__init__(self._found.taken_over())
        except FileNotFoundError:
            msg = f"session {folder.name} has ended meanwhile; start anew with %dist_init"
            raise InvalidInputError(msg) from None
        try:
            client = ipp.Client(
                connection_info=str(self.dir / "security" / "ipcontroller-client.json"),
                timeout=_CONNECT_TIMEOUT_S,
            )
        except (OSError, TimeoutError) as error:
            self.give_back()
            msg = (
                f"the controller of session {self.record.id} does not answer ({error}); "
                f"%dist_orphans --end {self.record.id} ends what is left of it"
            )
            raise StartError(msg) from error
        self.engines = Engines(client, self.slots)
        self.engines.note_missing()
        if self.record.guardian is None or not self.record.guardian.is_alive:
            self.post_guardian()

    def give_back(self) -> None:
        """Leave the session as it was found, to be taken over again or ended."""
        self.leave()
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            replace(self.record, driver=self._found.driver, owner=self._found.owner).write()


def _free_record(folder: Path) -> SessionRecord:
    record = SessionRecord.read(folder)
    if record is None:
        raise FileNotFoundError(folder)
    if not record.is_orphan:
        msg = (
            f"session {record.id} belongs to process {record.driver.pid}, which is running; "
            "restart that kernel first"
        )
        raise InvalidInputError(msg)
    return record
