"""The guardian's place is not left empty: who starts one, and starts another when it has ended."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from dtkit.guard.processes import Identity
from dtkit.guard.record import SessionRecord, locked

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["keep_posted", "post", "post_again"]

_LOOK_S = 5.0


def post(folder: Path, module: str = "dtkit.guard") -> Identity | None:
    """Start the guardian of a session.

    Args:
        folder: the session's.
        module: what is run.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    output = os.open(folder / "guardian.log", log, 0o600)
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", module, str(folder)],
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
    return Identity.of(pid)


def post_again(folder: Path, module: str = "dtkit.guard") -> bool:
    """Start another guardian if a session has neither kernel nor guardian; return whether.

    Args:
        folder: the session's.
        module: what is run.

    Raises:
        OSError: its folder is gone, or takes nothing.
    """
    if not _is_alone(SessionRecord.read(folder)):
        return False
    with locked(folder):  # several look; a kernel may be taking the session over
        record = SessionRecord.read(folder)
        if record is None or not _is_alone(record):
            return False
        replace(record, guardian=post(folder, module)).write()
        return True


def keep_posted(folder: Path, module: str = "dtkit.guard") -> None:
    """Look now and then, for ever, whether a session needs another guardian."""
    while True:
        time.sleep(_LOOK_S)
        with contextlib.suppress(OSError):  # the session has ended
            post_again(folder, module)


def _is_alone(record: SessionRecord | None) -> bool:
    return record is not None and record.is_orphan and not record.is_guarded
