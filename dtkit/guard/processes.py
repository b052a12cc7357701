"""Processes that cannot be mistaken for others, and their end.

A pid alone is not enough: it is given away again. Together with the start time,
which the kernel counts in ticks since the boot, and the boot's own id, it is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Identity", "boot_id", "end", "family"]

_START_TICKS = 19
"""Index of the start time in /proc/<pid>/stat, counted after the command. Source: proc(5)."""
_STATE = 0
_KILL_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Identity:
    """One process of this boot, and no other: not the next one with the same pid."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of a process that runs, None if there is none."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        # A zombie has ended; its parent has only not looked yet.
        return None if fields[_STATE] == "Z" else cls(pid, int(fields[_START_TICKS]))

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs."""
        return Identity.of(self.pid) == self


def boot_id() -> str:
    """Return what tells this boot of this machine from every other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def family(roots: Iterable[Identity]) -> tuple[Identity, ...]:
    """Return the roots that run, and everything below them."""
    found: dict[Identity, None] = {}
    for root in roots:
        if root.is_alive:
            found[root] = None
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(root.pid).children(recursive=True)
                found.update((i, None) for i in map(Identity.of, (c.pid for c in children)) if i)
    return tuple(found)


def end(identities: Iterable[Identity], *, grace_s: float) -> None:
    """End processes: SIGTERM, and SIGKILL to those that are still there after `grace_s`.

    A descriptor is held of each, so that no other process can be hit, whatever
    happens meanwhile. Returns when all have ended, or after three more seconds.

    Args:
        identities: whom to end; those that are gone are left out.
        grace_s: 0 sends SIGKILL at once.
    """
    held = [descriptor for i in identities if (descriptor := _hold(i)) is not None]
    try:
        if grace_s:
            _signal(held, signal.SIGTERM)
            _wait(held, grace_s)
        _signal(held, signal.SIGKILL)
        _wait(held, _KILL_TIMEOUT_S)
    finally:
        for descriptor in held:
            os.close(descriptor)


def _hold(identity: Identity) -> int | None:
    try:
        descriptor = os.pidfd_open(identity.pid)
    except OSError:
        return None
    if identity.is_alive:  # asked after: what the descriptor stands for cannot change any more
        return descriptor
    os.close(descriptor)
    return None


def _signal(descriptors: Iterable[int], number: int) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)


def _wait(descriptors: Iterable[int], timeout_s: float) -> None:
    """Wait until all have ended; a descriptor is readable from then on."""
    poll, waiting = select.poll(), set(descriptors)
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(1000 * left_s):
            poll.unregister(descriptor)
            waiting.discard(descriptor)
            with contextlib.suppress(ChildProcessError):  # not ours to reap
                os.waitid(os.P_PIDFD, descriptor, os.WEXITED)
