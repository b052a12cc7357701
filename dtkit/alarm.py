"""Alarm: wakes whoever waits for something, a thread that blocks or a coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Alarm"]


class Alarm:
    """One waits, any thread rings. A ring that nobody waited for ends the next wait at once."""

    def __init__(self) -> None:
        self._rung = threading.Event()
        self._sleeper: tuple[asyncio.AbstractEventLoop, Callable[[], None]] | None = None

    def ring(self) -> None:
        """Wake the one that waits."""
        self._rung.set()
        sleeper = self._sleeper
        if sleeper is not None:
            loop, wake = sleeper
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(wake)

    def ring_in(self, seconds: float) -> None:
        """Ring after some time."""
        timer = threading.Timer(seconds, self.ring)
        timer.daemon = True
        timer.start()

    def wait(self, timeout_s: float) -> None:
        """Wait, blocking the thread, until it rings, and no longer than `timeout_s`."""
        self._rung.wait(timeout_s)
        self._rung.clear()

    async def wait_async(self, timeout_s: float) -> None:
        """Wait, letting the loop do other things."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        self._sleeper = (loop, wake)
        # Not `asyncio.wait_for`, which makes a task of its own: this is done twenty times a second.
        timer = loop.call_later(timeout_s, wake)
        try:
            # Looked at after the sleeper is known: a ring in between would be missed.
            await (asyncio.sleep(0) if self._rung.is_set() else woken)
        finally:
            timer.cancel()
            self._sleeper = None
            self._rung.clear()
