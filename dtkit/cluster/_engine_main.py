"""Entry of an engine's process: ipyparallel's engine, with torch imported beside its start-up.

Importing torch takes seconds and most of them are not spent in Python code, so
a thread does it while the main thread connects and registers.
"""

from __future__ import annotations

import importlib
import os
import threading


class _NoShellThread:
    """Stands where a kernel with subshells has the thread that receives its messages."""

    parent_thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


def _preload() -> None:
    # A broken torch is reported by the first call that needs it, with its
    # traceback on the driver; here nobody would see it.
    for name in os.environ.get("DTKIT_PRELOAD", "").split(","):
        if name:
            importlib.import_module(name)


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


def main() -> None:
    """Run the engine until it is told to stop."""
    threading.Thread(target=_preload, name="dtkit-preload", daemon=True).start()
    _let_cells_await()
    from ipyparallel.engine.app import main as run_engine

    run_engine()


if __name__ == "__main__":
    main()
