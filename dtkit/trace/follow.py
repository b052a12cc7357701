"""The trace of a run that goes on: made from the ranks' rows again and again, whole each time."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from dtkit.trace.chrome import write
from dtkit.trace.rows import read_run

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TimelineThread", "default_name"]

_INTERVAL_S = 2.0
_MAX_SHARE = 0.05
"""Of the driver's time that may go into making the trace while the run goes on."""


def default_name(num_steps: int | None) -> str:
    """Return the file's name in the run's folder; a whole run's is compressed."""
    return "timeline.json" if num_steps else "timeline.json.gz"


class TimelineThread:
    """Writes the trace now and then, and at the end, from a thread of the driver.

    Args:
        run_dir: where the ranks write their rows.
        path: the trace.
        num_steps: how many of the last steps it shows; None: all.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, path: Path, num_steps: int | None) -> None:
        self._run_dir = run_dir
        self._path = path
        self._num_steps = num_steps
        write([], path)  # it can be opened from the beginning
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dtkit-trace", daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Write the trace as it ended, and end the thread; return the number of its events."""
        self._stop.set()
        self._thread.join()
        return self._write()

    def _run(self) -> None:
        wait_s = _INTERVAL_S
        while not self._stop.wait(wait_s):
            begun_s = time.monotonic()
            with contextlib.suppress(OSError):  # tried again; the last time is told of
                self._write()
            wait_s = max(_INTERVAL_S, (time.monotonic() - begun_s) / _MAX_SHARE)

    def _write(self) -> int:
        return write(read_run(self._run_dir, self._num_steps), self._path)
