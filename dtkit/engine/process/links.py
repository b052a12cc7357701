"""Links: the sockets by which collectives of this rank can be made to fail.

gloo offers no way to end a collective that waits for a rank which will never
come. What does is to shut the connections under it, on every rank its own.
They are recognised as they appear and duplicated at once: a descriptor that
gloo has closed meanwhile, and the system has given to another file, is never
touched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch.distributed.distributed_c10d as c10d

from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Links"]

_all: WeakSet[Links] = WeakSet()
"""What a forked child closes."""


@dataclass(frozen=True, slots=True)
class _Link:
    descriptor: int
    identity: str
    duplicate: socket.socket


class Links:
    """The connections of one generation of the process group.

    Args:
        store_port: where the group's store listens.
    """

    def __init__(self, store_port: int) -> None:
        self._store_port = store_port
        self._links: list[_Link] = []
        self._lock = threading.Lock()
        self._is_cut = False
        _close_in_children()
        _all.add(self)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Take in the connections that are opened within the context."""
        known = set(_sockets().values())
        try:
            yield
        finally:
            self._take(known)
            if self._is_cut:  # while a group was being made
                self.cut()

    @contextmanager
    def recording_groups(self) -> Iterator[None]:
        """Take in the connections of every group that is made within the context."""

        def make(original: Any) -> Any:  # Any: torch's own, with its own arguments
            def new_process_group(*args: Any, **kwargs: Any) -> Any:
                with self.recording():
                    return original(*args, **kwargs)

            return new_process_group

        # Under new_group, split_group, device meshes and FSDP alike.
        with replaced(c10d, "_new_process_group_helper", make):
            yield

    def cut(self, *, is_hard: bool = False) -> int:
        """Make every operation that waits on a connection fail now; return how many were cut.

        Args:
            is_hard: shut both directions. At first only the reading side is
                shut: shutting both leaves a parked send stuck in 6–12 % of
                cases (measured; gloo's failure path wakes receives, not every
                send).
        """
        how = socket.SHUT_RDWR if is_hard else socket.SHUT_RD
        # Groups are made by waiting at the store, over connections that come and go.
        self._take(set(), is_store=True)
        with self._lock:
            self._is_cut = True
            for link in self._links:
                with contextlib.suppress(OSError):  # already closed by its peer
                    link.duplicate.shutdown(how)
            return len(self._links)

    def close(self) -> None:
        """Let go of the duplicates; the connections themselves are gloo's."""
        with self._lock:
            for link in self._links:
                link.duplicate.close()
            self._links.clear()
        _all.discard(self)

    def close_in_child(self) -> None:
        """Close everything in a forked child: while it has them, peers do not see this rank end."""
        there = _sockets()
        for link in self._links:
            link.duplicate.close()
            if there.get(link.descriptor) == link.identity:
                with contextlib.suppress(OSError):
                    os.close(link.descriptor)
        self._links.clear()

    def _take(self, known: set[str], *, is_store: bool = False) -> None:
        with self._lock:
            there = _sockets()
            self._drop_closed(there)
            known = known | {link.identity for link in self._links}
            for descriptor, identity in there.items():
                if identity in known:
                    continue
                duplicate = _connected(descriptor, self._store_port, is_store=is_store)
                if duplicate is not None:
                    self._links.append(_Link(descriptor, identity, duplicate))
                    known.add(identity)

    def _drop_closed(self, there: dict[int, str]) -> None:
        """Let go of what gloo has closed: a group has ended, and its peers are to see that."""
        for link in [each for each in self._links if there.get(each.descriptor) != each.identity]:
            link.duplicate.close()
            self._links.remove(link)


def _connected(descriptor: int, store_port: int, *, is_store: bool) -> socket.socket | None:
    """Return a duplicate of a connection to the store, or of any other; None if it is not one."""
    try:
        copy = os.dup(descriptor)
    except OSError:  # closed meanwhile
        return None
    try:
        duplicate = socket.socket(fileno=copy)
    except OSError:  # closed, and given to something that is no socket
        os.close(copy)
        return None
    try:
        peer, own = duplicate.getpeername()[1], duplicate.getsockname()[1]
    except (OSError, IndexError):
        # Listening (shutting it down aborts the process) or not a TCP socket.
        peer = own = 0
    # The store's own end of its connections, on the rank that keeps it, is left alone.
    if peer and own != store_port and (peer == store_port) is is_store:
        return duplicate
    duplicate.close()
    return None


def _sockets() -> dict[int, str]:
    """Return this process's socket descriptors with the identity of each."""
    found = {}
    for path in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
            target = str(path.readlink())
            if target.startswith("socket:"):
                found[int(path.name)] = target
    return found


def _forget_in_child() -> None:
    for links in list(_all):
        links.close_in_child()


def _close_in_children() -> None:
    if not getattr(_close_in_children, "is_done", False):
        os.register_at_fork(after_in_child=_forget_in_child)
        _close_in_children.is_done = True  # type: ignore[attr-defined]
