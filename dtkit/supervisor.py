"""Waiting for a cell: stop and pause it, free ranks that wait for one that failed.

Everything here is a generator that yields while there is nothing to do, so the
same code serves a cell that awaits (clicks are served) and one that blocks.
"""

from __future__ import annotations

import re
import signal
import time
from typing import TYPE_CHECKING

from dtkit._ranks import format_ranks
from dtkit.errors import RankError, RankFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.cluster import Engines, Execution, Reply
    from dtkit.followed import FollowedExecution
    from dtkit.requests import Requests

__all__ = ["Supervisor", "failure_of"]

FLUSH_TIMEOUT_S = 2.0
_CONTROL_TIMEOUT_S = 1.0
_GRACE_S = 0.05
"""How long other ranks may take to fail by themselves, as they do on a syntax error."""
_SIGINT_AFTER_S = 1.0
"""How long a released rank may take before it is interrupted as well."""
_ABANDON_TIMEOUT_S = 5.0
_POLL_S = 0.01
_STOPPED = "RunStopped"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_BROKEN = ("RuntimeError", "DistBackendError", "HorovodInternalError")
_CAUSE = re.compile(r"out of memory on the|mismatch between collectives")
"""Never an echo, also when it comes after the rank was released."""
_ECHO = re.compile(
    r"gloo|nccl|Connection (closed|reset)|Broken pipe|aborted|is gone", re.IGNORECASE
)


class Supervisor:
    """Sees one cell through to its end on all of its ranks.

    Args:
        engines: the engines.
        execution: the cell that was sent.
        requests: what the user asks for meanwhile.
        has_steps: whether it is a run, which can stop between two steps; another
            cell can only be interrupted.
    """

    def __init__(
        self,
        engines: Engines,
        execution: Execution | FollowedExecution,
        requests: Requests,
        *,
        has_steps: bool,
    ) -> None:
        self._engines = engines
        self._execution = execution
        self._requests = requests
        self._has_steps = has_steps
        self.phase = "running"
        """running, pausing, paused, stopping or interrupting."""
        self.released: tuple[int, ...] = ()
        """Ranks whose collectives were cut, so the group must be rebuilt."""
        self._where: dict[int, str] = {}
        self._released_s = 0.0
        self._failed_s: float | None = None
        self._is_signalled = False

    @property
    def is_group_broken(self) -> bool:
        """Whether the process group cannot be used any more."""
        return bool(self.released)

    def wait(self) -> Iterator[None]:
        """Yield until the cell has ended on every rank and its output is here."""
        while not self._execution.poll():
            self._serve()
            yield
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while not self._execution.is_flushed() and time.monotonic() < deadline:
            yield

    def abandon(self) -> None:
        """Interrupt the ranks and wait, for a bounded time, until they have let go of the cell.

        For when nobody goes on to `wait`: ranks that run on unseen would answer nothing else.
        """
        deadline = time.monotonic() + _ABANDON_TIMEOUT_S
        if not self._execution.poll():
            self._release(self._execution.running)
            self._interrupt(self._execution.running)
        while not self._execution.poll() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def state(self) -> str:
        """Return finished, stopped or failed, from the ranks' replies."""
        names = {r.ename or r.status for r in self._execution.replies.values() if r.status != "ok"}
        if not names:
            return "finished"
        return "stopped" if names == {_STOPPED} or self._is_users_doing() else "failed"

    def error(self, epilogue: str = "") -> RankError | None:
        """Return what the cell failed with, None if it did not."""
        if self._is_users_doing():
            return None
        failures = [
            failure_of(reply, is_released=reply.rank in self.released)
            for reply in self._execution.replies.values()
            if reply.status != "ok" and reply.ename != _STOPPED
        ]
        if not failures:
            return None
        return RankError(tuple(sorted(failures, key=lambda f: (f.is_echo, f.rank))), epilogue)

    def _is_users_doing(self) -> bool:
        """Whether the ranks failed only because the user interrupted them."""
        failures = [
            failure_of(reply, is_released=reply.rank in self.released)
            for reply in self._execution.replies.values()
            if reply.status != "ok" and reply.ename != _STOPPED
        ]
        return self._requests.num_interrupts > 0 and all(
            f.is_echo or f.ename == "KeyboardInterrupt" for f in failures
        )

    def _serve(self) -> None:
        running = self._execution.running
        if self.released:
            self._press_on(running)
        elif self._is_stranded() or self._requests.num_interrupts > 1:
            self._release(running)
        elif self._requests.is_stop and self.phase != "stopping":
            self._stop(running)
        elif self._requests.is_pause and self.phase == "running":
            self._halt(running, "pause")
        elif not self._requests.is_pause and self.phase == "paused":
            self._engines.control("resume", ranks=running, timeout_s=_CONTROL_TIMEOUT_S)
            self.phase = "running"

    def _is_stranded(self) -> bool:
        """Whether a rank failed, so that others may wait for it in vain."""
        if self._failed_s is None:
            replies = self._execution.replies.values()
            if any(r.status != "ok" and r.ename != _STOPPED for r in replies):
                self._failed_s = time.monotonic()
            return False
        return time.monotonic() - self._failed_s > _GRACE_S

    def _stop(self, ranks: tuple[int, ...]) -> None:
        if self._has_steps:
            self._halt(ranks, "stop")
        else:
            self._interrupt(ranks)
        self.phase = "stopping"

    def _halt(self, ranks: tuple[int, ...], action: str) -> None:
        """Let all ranks reach the same boundary, and stop or pause there."""
        answers = self._engines.control("hold", ranks=ranks, timeout_s=_CONTROL_TIMEOUT_S)
        boundaries = [a["next_boundary"] for a in answers.values() if "next_boundary" in a]
        if boundaries:
            self._engines.control(
                "release",
                {"until": max(boundaries), "action": action},
                ranks=ranks,
                timeout_s=_CONTROL_TIMEOUT_S,
            )
        self.phase = "paused"

    def _release(self, ranks: tuple[int, ...]) -> None:
        """Free ranks from collectives that can never end."""
        self.phase = "interrupting"
        self._engines.control("cut", ranks=ranks, timeout_s=_CONTROL_TIMEOUT_S)
        self.released = ranks
        self._released_s = time.monotonic()
        if self._requests.num_interrupts > 1:
            self._interrupt(ranks)

    def _press_on(self, ranks: tuple[int, ...]) -> None:
        """Interrupt a rank that was freed and goes on: it is not in a collective."""
        if not self._is_signalled and time.monotonic() - self._released_s > _SIGINT_AFTER_S:
            self._interrupt(ranks)

    def _interrupt(self, ranks: tuple[int, ...]) -> None:
        self._is_signalled = True
        self._engines.signal(signal.SIGINT, ranks)


def failure_of(reply: Reply, *, is_released: bool = False) -> RankFailure:
    """Return a rank's reply as a failure, with the cell's own line number."""
    if reply.status == "died":
        text = "the engine's process ended"
        return RankFailure(reply.rank, "EngineDied", text, f"EngineDied: {text}")
    traceback = _ANSI.sub("", reply.traceback)
    lines = re.findall(r"Cell[^\n]*?In\[\d+\][^\n]*?line (\d+)", traceback)
    is_echo = not _CAUSE.search(reply.evalue) and bool(
        (is_released and reply.ename in ("KeyboardInterrupt", *_BROKEN))
        or (reply.ename in _BROKEN and _ECHO.search(reply.evalue))
    )
    return RankFailure(
        rank=reply.rank,
        ename=reply.ename or reply.status,
        evalue=reply.evalue,
        traceback=reply.traceback or f"{reply.ename}: {reply.evalue}",
        line=int(lines[-1]) if lines else None,
        is_echo=is_echo,
    )


def release_text(released: tuple[int, ...], world_size: int) -> str:
    """Return the line that says whom a failure freed."""
    verb = "was" if len(released) == 1 else "were"
    return f"{format_ranks(released, world_size)} {verb} waiting for it and {verb} released"
