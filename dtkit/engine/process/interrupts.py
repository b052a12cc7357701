"""Interrupts: SIGINT ends the user's code, and nothing else of this engine.

ipykernel lets it raise KeyboardInterrupt as long as a request is being served.
In the kernel's own code that loses the reply, and the driver waits for ever;
within an import it leaves half a module, which is of no use for as long as the
process lives.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

__all__ = ["is_importing", "protect"]

_IMPORT = "<frozen importlib._bootstrap>"
_AGAIN_S = 0.05


def protect(kernel: Any, may_interrupt: Callable[[], bool]) -> None:
    """Let SIGINT raise KeyboardInterrupt only where it is meant for.

    Args:
        kernel: ipykernel's, untyped.
        may_interrupt: whether the user's code is running.
    """

    def on_signal(_number: int, frame: FrameType | None) -> None:
        if not may_interrupt():
            return
        if is_importing(frame):
            later = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
            later.daemon = True
            later.start()
            return
        raise KeyboardInterrupt

    prepare = kernel.pre_handler_hook

    def pre_handler_hook() -> None:
        prepare()  # remembers what to put back
        signal.signal(signal.SIGINT, on_signal)

    kernel.pre_handler_hook = pre_handler_hook


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being loaded below this frame."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
