"""The file of a rank's rows: written by a thread, bounded in size, whole after a kill."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections import deque
from typing import IO, TYPE_CHECKING, Any

from dtkit.trace.rows import encode_names, encode_step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dtkit.engine.trace.collectives import Collectives
    from dtkit.trace.rows import Clock, Head

__all__ = ["RowFile"]

_INTERVAL_S = 0.5


class RowFile:
    """Appends rows of steps, twice a second, from a thread of its own.

    Of a bounded timeline the file is begun anew after `limit` steps and the full one
    kept beside it: there are always the last `limit` steps on disk, and never more
    than twice as many. Rows that would be thrown away again are never encoded.

    Args:
        path: the file; beside it `path.1` may lie, and `path.gz` in the end.
        head: its first line.
        collectives: whose names are written with the rows.
        limit: number of steps that are kept; None: all.
        on_error: takes a line for the user; writing ends then, the run goes on.
    """

    def __init__(
        self, path: Path, head: Head, collectives: Collectives, limit: int | None,
        on_error: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._path = path
        self._head = head
        self._collectives = collectives
        self._limit = limit
        self._on_error = on_error
        self._ring: deque[list[Any]] = deque(maxlen=limit)  # Any: a Step, as a list
        self._file: IO[bytes] | None = None
        self._num_named = 0
        self._num_steps = 0
        self._has_failed = False
        self.clock: Clock | None = None
        """How the clocks compare at the end; written last."""
        self._write([])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dtkit-timeline", daemon=True)
        self._thread.start()

    def add(self, step: list[Any]) -> None:
        """Keep the rows of a step for the next round. Called on the training thread."""
        self._ring.append(step)

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._stop.set()
        self._thread.join()
        self._write_ring()
        if self._file is not None:
            if self.clock is not None:
                with contextlib.suppress(OSError):  # a full disk: the first comparison counts
                    self._file.write(self.clock.encode())
            self._file.close()
        if self._limit is None and not self._has_failed:
            self._compress()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._write_ring()

    def _write_ring(self) -> None:
        ring = self._ring
        # The newest step's last collective may still be under way: it waits a round.
        num = len(ring) if self._stop.is_set() else len(ring) - 1
        rows = []
        for _ in range(num):
            with contextlib.suppress(IndexError):  # it was full: the oldest fell out meanwhile
                rows.append(ring.popleft())
        self._write(rows)

    def _write(self, rows: list[list[Any]]) -> None:
        if self._has_failed:
            return
        try:
            if self._limit is not None and self._num_steps >= self._limit:
                self._begin_anew()
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("wb")
                self._file.write(self._head.encode())
            known = self._collectives
            num = len(known.tensors) + len(known.groups)
            if num > self._num_named:
                self._file.write(encode_names(dict(known.groups), dict(known.tensors)))
                self._num_named = num
            self._file.write(b"".join(map(encode_step, rows)))
            self._file.flush()
            self._num_steps += len(rows)
        except OSError as error:
            self._has_failed = True
            self._on_error(f"the timeline is not written any more: {error}")

    def _begin_anew(self) -> None:
        assert self._file is not None  # noqa: S101  for the type checker: it has steps
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._file, self._num_named, self._num_steps = None, 0, 0

    def _compress(self) -> None:
        zipped = self._path.with_name(self._path.name + ".gz")
        zipped.write_bytes(gzip.compress(self._path.read_bytes(), 3))
        self._path.unlink()
