"""How a process ended, in words; and the end of what it left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["end_session", "exit_text", "last_words", "num_oom_kills"]

_NUM_LINES = 8
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_OWN_LINE = re.compile(r"\d{4}-\d\d-\d\d .*\[(Engine|KernelNanny)[.\]]|Extension modules: |\s*$")
_CRASH = "Fatal Python error: "  # as faulthandler begins, the innermost frame first
_CELL = re.compile(r"Handling execute_request: .*")  # as ipykernel begins a cell
_KILL_TIMEOUT_S = 2.0


def exit_text(code: int | None, oom_kills: tuple[int, int] = (0, 0)) -> str:
    """Return what an exit code says.

    Args:
        code: as `subprocess` gives it, negative for a signal; None if unknown.
        oom_kills: `num_oom_kills` at an earlier time, and now.
    """
    if code in (None, -signal.SIGKILL) and oom_kills[1] > oom_kills[0]:
        return f"was killed by {signal.SIGKILL.name}: the system ran out of memory"
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def last_words(log: str) -> str:
    """Return the few lines of an engine's log that tell most, without ipyparallel's own.

    What an earlier cell has left there, such as its traceback, did not end the engine.
    """
    of_last_cell = _CELL.split(_ANSI.sub("", log))[-1]
    _, crash, stack = of_last_cell.rpartition(_CRASH)
    lines = [line for line in stack.splitlines() if not _OWN_LINE.match(line)]
    if crash:
        return "\n".join([crash + lines[0], *lines[1:_NUM_LINES]])
    return "\n".join(lines[-_NUM_LINES:])


def num_oom_kills() -> int:
    """Return how often the system has killed a process of this control group for its memory.

    Where no group counts them, how often it has killed any process.
    """
    for path in _oom_counters():
        with contextlib.suppress(OSError, ValueError, KeyError):
            rows = dict(row.split() for row in path.read_text().splitlines())
            return int(rows["oom_kill"])
    return 0


def _oom_counters() -> Iterator[Path]:
    """Yield the files that count such kills, the most exact first."""
    groups = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):  # control groups of version 1
                yield groups / "memory" / path.lstrip("/") / "memory.oom_control"
            elif not controllers:
                yield groups / path.lstrip("/") / "memory.events"
    yield Path("/proc/vmstat")


def end_session(leader: int) -> None:
    """Kill what a dead engine left: DataLoader workers live on for seconds and hold memory.

    Args:
        leader: the engine's pid; it was started as leader of a session of its own,
            and while one of its children lives no other process gets that number.
    """
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if process.pid != leader and os.getsid(process.pid) == leader:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=_KILL_TIMEOUT_S)
