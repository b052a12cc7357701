"""Sessions whose kernel is gone: found by their records, taken over or ended by process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError
from dtkit.guard.processes import end, family
from dtkit.guard.record import (
    RankRun,
    SessionRecord,
    active_ranks,
    find_records,
    locked,
    notebook_name,
    remove,
)
from dtkit.values import Orphan

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["choose_orphan", "end_orphan", "list_orphans"]

_GRACE_S = 2.0


def list_orphans() -> tuple[Orphan, ...]:
    """Return this user's sessions on this host whose kernel is gone, the newest first."""
    return tuple(map(_describe, _orphans()))


def choose_orphan(session_id: str | None) -> SessionRecord:
    """Return the orphan that is meant.

    Args:
        session_id: its id; None: the only one there is, or the only one of this notebook.

    Raises:
        InvalidInputError: there is none, or more than one.
    """
    found = _orphans()
    if session_id is None:
        mine = [r for r in found if r.owner and r.owner == notebook_name()]
        if len(mine or found) == 1:
            return (mine or found)[0]
    elif named := [record for record in found if record.id == session_id]:
        return named[0]
    if not found:
        msg = "there is no session without a kernel; %dist_init starts a new one"
    elif session_id is None:
        msg = f"there are several sessions without a kernel: name one of {_ids(found)}"
    else:
        msg = f"there is no session {session_id!r} without a kernel; there is {_ids(found)}"
    raise InvalidInputError(msg)


def end_orphan(session_id: str) -> Orphan:
    """End an orphan's processes, each known by pid and start time, and remove its folder.

    Raises:
        InvalidInputError: there is no such session, or a kernel has taken it over.
    """
    record = choose_orphan(session_id)
    orphan = _describe(record)
    with locked(record.dir):
        now = SessionRecord.read(record.dir)
        if now is None or not now.is_orphan:
            msg = f"session {session_id} was taken over or ended meanwhile; see %dist_orphans"
            raise InvalidInputError(msg)
        end(family(now.processes), grace_s=_GRACE_S)
        if now.guardian is not None:
            end([now.guardian], grace_s=0.0)
        remove(record.dir)
    return orphan


def _orphans() -> list[SessionRecord]:
    return [record for record in find_records() if record.is_orphan and record.is_alive]


def _describe(record: SessionRecord) -> Orphan:
    active = active_ranks(record.dir)
    runs = [run for rank, run in RankRun.read_all(record.dir).items() if rank in active]
    since = record.idle_since_unix_s
    left_s = None
    if record.is_guarded and since is not None:
        left_s = max(0.0, since + record.lease_s - time.time())
    return Orphan(
        id=record.id,
        num_ranks=len(record.slots),
        backend=record.backend,
        notebook=record.owner,
        run=Path(runs[0].dir).name if runs else "",
        left_s=left_s,
        has_guardian=record.is_guarded,
        is_headless=record.is_headless,
        num_processes=len(family(record.processes)),
    )


def _ids(records: Iterable[SessionRecord]) -> str:
    return ", ".join(record.id for record in records)
