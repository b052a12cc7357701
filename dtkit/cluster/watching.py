"""EndWatch: hears of the end of processes that are not children of this one."""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dtkit.guard.processes import Identity

__all__ = ["EndWatch"]


class EndWatch:
    """Calls a function, on a thread of its own, when a process has ended.

    Args:
        processes: each with what is to be called; at once if it has ended already.
    """

    def __init__(self, processes: Mapping[Identity, Callable[[], None]]) -> None:
        self._poll = select.poll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.POLLIN)
        self._lock = threading.Lock()
        self._is_over = False
        self._on_end: dict[int, Callable[[], None]] = {}
        gone = []
        for process, on_end in processes.items():
            try:
                descriptor = os.pidfd_open(process.pid)
            except OSError:
                gone.append(on_end)
                continue
            self._on_end[descriptor] = on_end
            self._poll.register(descriptor, select.POLLIN)
            if not process.is_alive:  # another has its number
                self._forget(descriptor)
                gone.append(on_end)
        name = "dtkit-end-watch"
        threading.Thread(target=self._watch, args=(gone,), name=name, daemon=True).start()

    def close(self) -> None:
        """Watch no more; safe to call twice, and from what is called at an end."""
        with self._lock:
            if not self._is_over:
                os.eventfd_write(self._wake, 1)

    def _watch(self, gone: list[Callable[[], None]]) -> None:
        for on_end in gone:
            on_end()
        try:
            while self._on_end:
                ready = [descriptor for descriptor, _ in self._poll.poll()]
                if self._wake in ready:
                    return
                for descriptor in ready:
                    self._forget(descriptor)()
        finally:
            for descriptor in list(self._on_end):
                self._forget(descriptor)
            with self._lock:
                self._is_over = True
                os.close(self._wake)

    def _forget(self, descriptor: int) -> Callable[[], None]:
        self._poll.unregister(descriptor)
        os.close(descriptor)
        return self._on_end.pop(descriptor)
