"""What a person would see: when a word first comes, and how many bytes have come."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Seen"]


class Seen:
    """Reads along what is shown. One thread feeds it, another one asks.

    Attributes:
        num_bytes: how many have come since `watch`.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._at_s: dict[bytes, float] = {}
        self._wanted: set[bytes] = set()
        self._changed = threading.Condition()
        self._end = b""

    def watch(self, words: Iterable[str]) -> None:
        """Begin anew, looking for these words."""
        with self._changed:
            self._wanted = {word.encode() for word in words}
            self._at_s.clear()
            self._end, self.num_bytes = b"", 0

    def feed(self, data: bytes) -> None:
        """Take what has just been shown; a word may be divided between two pieces."""
        now_s = time.monotonic()
        with self._changed:
            text = self._end + data
            found = {word for word in self._wanted if word in text}
            self._at_s |= dict.fromkeys(found, now_s)
            self._wanted -= found
            self._end = text[-100:]
            self.num_bytes += len(data)
            if found:
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> float | None:
        """Wait until all words have come; returns when the last did, None if one has not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted, timeout_s)
            return None if self._wanted else max(self._at_s.values(), default=None)
