"""What an interrupt must not cut in two: an engine that is being started, a group between two."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ["interrupt_held"]


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Hold an interrupt back until the end of the context; a second one is let through.

    For what is over in a moment, and half done is of no use. Changes nothing in other
    threads than the main one, which get none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held and callable(before):
            before(number, frame)
        held.append(frame)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(signal.SIGINT, held[0])
