"""Timeline: rank 0's record of negotiations and collectives, as Horovod's own.

Source: "Trace Event Format" (Google, 2016): each tensor is a process; in it
NEGOTIATE_ALLREDUCE has a tick per rank as it becomes ready, then comes ALLREDUCE
until rank 0 has taken the result. What is written is there at once, and the array
is closed by `close`; Chrome's tracing page and Perfetto also open one that is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtkit.horovod.wire import Message

__all__ = ["Timeline", "file_of_environment"]


class Timeline:
    """Writes a file; every method may be called from any thread.

    Args:
        path: the file.
        mark_cycles: whether each time that ranks are heard is marked.
    """

    def __init__(self, path: str, *, mark_cycles: bool = False) -> None:
        self._mark_cycles = mark_cycles
        self._lock = threading.Lock()
        self._start_ns = time.monotonic_ns()
        self._pids: dict[str, int] = {}
        self._open: dict[str, str] = {}
        """What each tensor is in: NEGOTIATE_… or the operation."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] | None = target.open("w")
        self._file.write("[\n")
        self._file.flush()
        self._is_first = True
        args = {"start_time_since_epoch_in_micros": time.time_ns() // 1000}
        self._write({"name": "process_name", "ph": "M", "pid": 0, "args": args})
        self._write({"name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0}})

    def submitted(self, rank: int, name: str, kind: str) -> None:
        """A rank is ready for a collective."""
        with self._lock:
            pid = self._pid(name)
            # One that is open is done: this rank has its result, if rank 0 has not yet.
            if not self._open.get(name, "").startswith("NEGOTIATE"):
                self._end(name)
                self._begin(name, f"NEGOTIATE_{kind.upper()}")
            self._write({"ph": "X", "name": str(rank), "ts": self._now(), "pid": pid, "dur": 0})

    def agreed(self, name: str, meta: Message) -> None:
        """All ranks are ready: the collective begins."""
        with self._lock:
            self._end(name)
            self._begin(name, str(meta["kind"]).upper())

    def finished(self, name: str, meta: Message) -> None:
        """Rank 0 has the result."""
        with self._lock:
            args = {
                "dtype": ", ".join(map(str, meta.get("dtype", []))),
                "shape": ", ".join(map(str, meta.get("shape", []))),
            }
            if not self._open.get(name, "").startswith("NEGOTIATE"):
                self._end(name, args)

    def heard(self) -> None:
        """The negotiation has heard ranks: what Horovod calls a cycle."""
        if self._mark_cycles:
            with self._lock:
                self._write({"ph": "i", "name": "CYCLE_START", "ts": self._now(), "s": "g"})

    def close(self) -> None:
        """End what is open, and the file."""
        with self._lock:
            for name in list(self._open):
                self._end(name)
            self._put("\n]\n")
            self._end_file()

    def _pid(self, name: str) -> int:
        pid = self._pids.get(name)
        if pid is None:
            pid = self._pids[name] = len(self._pids) + 1
            self._write({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
            args = {"sort_index": pid}
            self._write({"name": "process_sort_index", "ph": "M", "pid": pid, "args": args})
        return pid

    def _begin(self, name: str, what: str) -> None:
        self._open[name] = what
        self._write({"ph": "B", "name": what, "ts": self._now(), "pid": self._pid(name)})

    def _end(self, name: str, args: dict[str, str] | None = None) -> None:
        if self._open.pop(name, None) is not None:
            event: dict[str, Any] = {"ph": "E", "ts": self._now(), "pid": self._pid(name)}
            self._write({**event, "args": args} if args else event)

    def _now(self) -> int:
        return (time.monotonic_ns() - self._start_ns) // 1000

    def _write(self, event: dict[str, Any]) -> None:
        self._put(("" if self._is_first else ",\n") + json.dumps(event))
        self._is_first = False

    def _put(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:  # the training matters more, and the negotiation with it
            sys.stderr.write(f"hvd: the timeline ends here: {error}\n")
            self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it holds back cannot be written either
                self._file.close()
            self._file = None


def file_of_environment() -> tuple[str, bool] | None:
    """Return the file that HOROVOD_TIMELINE names, and whether to mark cycles."""
    path = os.environ.get("HOROVOD_TIMELINE", "")
    if not path or path == "DYNAMIC":  # begun later, by hvd.start_timeline
        return None
    return path, os.environ.get("HOROVOD_TIMELINE_MARK_CYCLES", "0") not in ("", "0")
