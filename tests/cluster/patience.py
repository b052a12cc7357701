"""Waiting in a test for what another process or thread does."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["wait_until"]

_POLL_S = 0.01


def wait_until(
    is_so: Callable[[], object], what: Callable[[], object] | str, *, within_s: float = 60.0
) -> None:
    """Wait until something is so; what hangs fails the test, and says what was waited for.

    Args:
        is_so: tells whether it is.
        what: it, or what tells how things stand instead.
        within_s: how long it may take on a busy machine.
    """
    end_s = time.monotonic() + within_s
    while not is_so():
        found = what if isinstance(what, str) else what()
        assert time.monotonic() < end_s, f"waited in vain: {found}"
        threading.Event().wait(_POLL_S)
