"""Entry of an engine's process: ipyparallel's engine, with torch imported beside its start-up.

Importing torch takes seconds and most of them are not spent in Python code, so
a thread does it while the main thread connects and registers.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

from dtkit.guard.posting import keep_posted

_FILE_TIMEOUT_S = 10.0
_FILE_POLL_S = 0.005
_PR_SET_PDEATHSIG = 1
"""Source: prctl(2)."""


class _NoShellThread:
    """Stands where a kernel with subshells has the thread that receives its messages."""

    parent_thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


def _preload() -> None:
    gc.disable()  # it would go through what is loaded again and again: a fifth of the time
    try:
        # A broken torch is reported by the first call that needs it, with its
        # traceback on the driver; here nobody would see it.
        for name in os.environ.get("DTKIT_PRELOAD", "").split(","):
            if name:
                importlib.import_module(name)
    finally:
        gc.freeze()  # it is there for the life of the process
        gc.enable()


def _let_cells_await() -> None:
    """Let a cell on an engine use `await`.

    ipykernel 7.4 asks `shell_channel_thread.parent_thread` before it awaits a
    cell. Engines have no such thread, and ipyparallel 9.2 does not give them a
    stand-in: the cell dies in the kernel and its reply never comes.
    """
    from ipyparallel.engine import app

    class EngineKernel(app.Kernel):  # type: ignore[misc]  # ipyparallel is untyped
        shell_channel_thread = _NoShellThread()
        _supports_kernel_subshells = False

    app.Kernel = EngineKernel


def _engine_class() -> type:
    """Return ipyparallel's engine, but one that waits until its connection file is whole.

    The controller writes the file in place. ipyparallel 9.2 waits until it
    exists, and an engine that comes a moment later reads half of it and ends.
    """
    from ipyparallel.engine import app

    class Engine(app.IPEngine):  # type: ignore[misc]  # ipyparallel is untyped
        def load_connection_file(self) -> None:
            deadline = time.monotonic() + _FILE_TIMEOUT_S
            while True:
                try:
                    super().load_connection_file()
                except json.JSONDecodeError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_FILE_POLL_S)
                else:
                    return

    return Engine


def _end_with_parent() -> None:
    """Let the system end this engine with the agent that started it, however that ends."""
    parent = os.environ.get("DTKIT_PARENT")
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it has ended before this was arranged
            os.kill(os.getpid(), signal.SIGKILL)


def _keep_guardian() -> None:
    """Let a thread see to it that the session has a guardian when its kernel is gone."""
    folder = os.environ.get("DTKIT_SESSION_DIR")
    if folder and "DTKIT_PARENT" not in os.environ:  # else it ends with its agent
        name = "dtkit-keep-guardian"
        threading.Thread(target=keep_posted, args=(Path(folder),), name=name, daemon=True).start()


def _let_children_end() -> None:
    """Let forked children end by SIGTERM, as those of any process do.

    They inherit the engine's handler, which stops a loop that does not run there: whoever ends
    one (`multiprocessing.Pool`, a DataLoader) would wait for ever. SIGTERM is held back until
    the child has put its default in place; it may come before the child has run at all.
    """
    mask = threading.local()

    def hold() -> None:
        mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask.before)

    def let_go_in_child() -> None:
        if getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == "_signal_stop":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let_go()

    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=let_go_in_child)


def main() -> None:
    """Run the engine until it is told to stop."""
    _end_with_parent()
    _keep_guardian()
    # A crash leaves its stack in the log: ipykernel takes descriptor 2 away later.
    faulthandler.enable(os.dup(2))
    # On a full disk each line of the log would be a traceback in the cell's output.
    logging.raiseExceptions = False
    # Cells get KeyboardInterrupt, as ipykernel arranges; between them one would end the engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _let_children_end()
    threading.Thread(target=_preload, name="dtkit-preload", daemon=True).start()
    _let_cells_await()
    _engine_class().launch_instance()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
