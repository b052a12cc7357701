"""Waiting for a cell, blocking or not, with Interrupt as a request and not as an exception."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dtkit.errors import DtkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from dtkit.driver.requests import Requests

__all__ = ["Interrupted", "drive", "drive_async", "in_background"]

_MAX_WAIT_S = 0.05
"""The steps are looked at so often, and at once when the alarm rings."""


_BEGIN_TIMEOUT_S = 5.0
"""Longer than ranks take to say that a run has begun on them."""


class Interrupted(KeyboardInterrupt):
    """The user pressed Interrupt and the ranks have stopped; cells after this one do not run."""

    def _render_traceback_(self) -> list[str]:
        return [f"Interrupted: {self}"]


def drive(steps: Iterator[None], requests: Requests) -> None:
    """Exhaust `steps`, blocking; Interrupt becomes a request."""
    with _interrupts(requests):
        for _ in steps:
            requests.alarm.wait(_MAX_WAIT_S)
    _raise_if_interrupted(requests)


async def drive_async(steps: Iterator[None], requests: Requests) -> None:
    """Exhaust `steps`, letting the kernel serve other messages in between."""
    with _interrupts(requests):
        for _ in steps:
            try:
                await requests.alarm.wait_async(_MAX_WAIT_S)
            except asyncio.CancelledError:
                # How ipykernel interrupts a cell that awaits, where no signal
                # handler could be installed. The ranks are asked; we go on waiting.
                requests.interrupt()
                task: Any = asyncio.current_task()
                task.uncancel()
    _raise_if_interrupted(requests)


def in_background(
    steps: Iterator[None], requests: Requests, before: Callable[[], None] = lambda: None
) -> None:
    """Exhaust `steps` in a thread; what a run fails with is in `Run.error`.

    Returns when the first is made: what comes next finds the ranks busy, and can stop them.

    Args:
        steps: of a run.
        requests: the run's.
        before: called in the thread first.
    """
    has_begun = threading.Event()

    def announced() -> Iterator[None]:
        for step in steps:
            has_begun.set()
            yield step

    def go_on() -> None:
        try:
            before()
            with contextlib.suppress(DtkitError):  # the run holds it
                drive(announced(), requests)
        finally:
            has_begun.set()

    requests.is_background = True
    threading.Thread(target=go_on, name="dtkit-background", daemon=True).start()
    has_begun.wait(_BEGIN_TIMEOUT_S)


@contextmanager
def _interrupts(requests: Requests) -> Iterator[None]:
    """Count presses of Interrupt instead of raising KeyboardInterrupt here and now.

    ipykernel's own handler cancels an awaiting cell once and ignores every
    press after that; the second and third press mean something to us.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        requests.interrupt()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _raise_if_interrupted(requests: Requests) -> None:
    if requests.num_interrupts:
        raise Interrupted(requests.outcome or "the ranks have stopped and keep their state")
