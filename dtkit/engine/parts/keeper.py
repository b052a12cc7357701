"""What of a run outlives its driver: what the cell shows, and that it is running.

A kernel that comes later reads the run's folder (`output-<R>.jsonl` beside the
rank's events) and finds all that it would have seen live; the session's
guardian reads the session's folder and lets the lease wait while a run goes on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dtkit.engine.parts import Part
from dtkit.engine.patches import replaced
from dtkit.engine.process.agent import agent
from dtkit.guard.processes import Identity
from dtkit.guard.record import RankRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.engine.run import ActiveRun

__all__ = ["make"]

_KEPT = frozenset({
    "stream", "display_data", "update_display_data", "execute_result", "clear_output", "error",
})  # fmt: skip


class Keeper(Part):
    """Writes down what the cell shows, message by message, as it is sent.

    Args:
        run: the run.
        session_dir: the session's folder.
    """

    def __init__(self, run: ActiveRun, session_dir: Path) -> None:
        process = Identity.of(os.getpid())
        assert process is not None  # noqa: S101  it is us
        self._run = run
        self._session_dir = session_dir
        self._path = run.dir / f"output-{run.rank}.jsonl"
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._now = RankRun(
            rank=run.rank, ranks=run.ranks, process=process, dir=str(run.dir),
            start_unix_s=run.start_unix_s, state="running",
        )  # fmt: skip

    def begin(self) -> None:
        """Begin to listen to what is sent."""
        self._say("running")
        try:
            # On another host than the driver's it need not be there yet.
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._stack.enter_context(self._path.open("a"))
        except OSError as error:
            self._run.note(f"what the cell shows is not stored on disk: {error}")
            return
        self._stack.enter_context(replaced(agent().kernel.session, "send", self._tap))

    def end(self, state: str) -> None:
        """Write what is still on its way, and say how it ended."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with self._lock:
            self._file = None
        self._stack.close()
        self._say(state)

    def _say(self, state: str) -> None:
        try:
            replace(self._now, state=state).write(self._session_dir)
        except OSError as error:
            self._run.note(f"this run cannot be found by another kernel: {error}")

    # Any, below: jupyter_client's messages and sockets.

    def _tap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def send(stream: Any, message: Any, content: Any = None, *args: Any, **kwargs: Any) -> Any:
            is_whole = isinstance(message, dict)
            kind = message["header"]["msg_type"] if is_whole else message
            if kind in _KEPT:
                self._keep(kind, message["content"] if is_whole else content)
            return original(stream, message, content, *args, **kwargs)

        return send

    def _keep(self, kind: str, content: Any) -> None:
        # Figures travel as text already; what else an object's own display hook may
        # give is not worth a failure of the cell.
        line = json.dumps({"msg_type": kind, "content": content}, default=repr)
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                self._file = None
                self._run.note(f"what the cell shows is not stored on disk any more: {error}")


def make(run: ActiveRun) -> Part:
    """Return the keeper for a run; one that does nothing where no session has a folder."""
    folder = os.environ.get("DTKIT_SESSION_DIR")
    return Keeper(run, Path(folder)) if folder else Part()
