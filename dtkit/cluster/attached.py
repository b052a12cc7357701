"""AttachedCluster: engines that an earlier kernel started, taken over by this one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import ipyparallel as ipp

from dtkit.cluster._launchers import relying_on_curve
from dtkit.cluster.deaths import exit_text
from dtkit.cluster.engines import Engines
from dtkit.cluster.host import HostCluster
from dtkit.cluster.watching import EndWatch
from dtkit.errors import InvalidInputError, StartError
from dtkit.guard.record import SessionRecord, locked, read_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dtkit.guard.processes import Identity

__all__ = ["AttachedCluster"]

_CONNECT_TIMEOUT_S = 10.0


class AttachedCluster(HostCluster):
    """Connects to the engines of a session whose kernel is gone.

    Args:
        folder: the session's.
        preload: modules that engines import while they start.

    Raises:
        InvalidInputError: it has ended, or another kernel has it.
        StartError: its controller does not answer.
    """

    def __init__(self, folder: Path, preload: Sequence[str] = ()) -> None:
        self._watch: EndWatch | None = None
        try:
            with locked(folder):
                self._found = _free_record(folder)
                super().__init__(self._found.taken_over(), preload)
        except FileNotFoundError:
            msg = f"session {folder.name} has ended meanwhile; start anew with %dist_init"
            raise InvalidInputError(msg) from None
        try:
            with relying_on_curve():
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
        self.engines: Engines = Engines(client, self.slots)
        self.engines.note_missing()
        self.keys: dict[str, bytes] = read_keys(self.dir)
        if not self.record.is_guarded:
            self.post_guardian()
        self._watch = EndWatch(self._ends())

    def leave(self) -> None:
        """Disconnect; the session lives on for its lease."""
        if self._watch is not None:
            self._watch.close()
        super().leave()

    def give_back(self) -> None:
        """Leave the session as it was found, to be taken over again or ended."""
        self.leave()
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            replace(self.record, driver=self._found.driver, owner=self._found.owner).write()

    def _ends(self) -> dict[Identity, Callable[[], None]]:
        """Return what is to be done when a process ends that an earlier kernel started."""
        ends: dict[Identity, Callable[[], None]] = {}
        for slot in self.slots:
            process = self._engine(slot.engine)
            if process is not None:
                ends[process] = partial(self._engine_ended, slot.engine, process.pid)
        controller = self.record.controller
        if controller is not None:
            ends[controller] = partial(self._break_down, exit_text(None))
        return ends


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
    if record.is_headless:
        msg = (
            f"session {record.id} cannot be reached any more, its controller has ended: "
            f"%dist_orphans --end {record.id} ends what is left of it"
        )
        raise StartError(msg)
    return record
