"""Alarm: wakes whoever waits for something, a thread that blocks or a coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import threading

__all__ = ["Alarm"]


class Alarm:
    """One waits, any thread rings. A ring that nobody waited for ends the next wait at once."""

    def __init__(self) -> None:
        self._rung = threading.Event()
        self._sleeper: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def ring(self) -> None:
        """Wake the one that waits."""
        self._rung.set()
        sleeper = self._sleeper
        if sleeper is not None:
            loop, event = sleeper
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(event.set)

    def wait(self, timeout_s: float) -> None:
        """Wait, blocking the thread, until it rings, and no longer than `timeout_s`."""
        self._rung.wait(timeout_s)
        self._rung.clear()

    async def wait_async(self, timeout_s: float) -> None:
        """Wait, letting the loop do other things."""
        event = asyncio.Event()
        self._sleeper = (asyncio.get_running_loop(), event)
        try:
            # Looked at after the sleeper is known: a ring in between would be missed.
            if not self._rung.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), timeout_s)
            else:
                await asyncio.sleep(0)
        finally:
            self._sleeper = None
            self._rung.clear()
