"""Waiting for a cell: stop and pause it, free ranks that wait for one that failed.

Everything here is a generator that yields while there is nothing to do, so the
same code serves a cell that awaits (clicks are served) and one that blocks.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

from dtkit.driver.boundary import Boundary
from dtkit.driver.deadlock import Deadlock
from dtkit.driver.failures import failure_of
from dtkit.driver.interrupts import Interrupts
from dtkit.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.cluster import Engines, Execution
    from dtkit.driver.requests import Requests
    from dtkit.driver.runs.followed import FollowedExecution
    from dtkit.errors import RankFailure

__all__ = ["Supervisor"]

FLUSH_TIMEOUT_S = 2.0
_CONTROL_TIMEOUT_S = 1.0
_GRACE_S = 0.02
"""How long other ranks may take to fail by themselves, as all do when the cell is wrong."""
_ANSWER_S = 1.0
"""How long a rank may take to answer one measure before the next, harder one."""
_PARKED_S = 0.2
"""How long after its connections were cut a rank may take to come out of its collective."""
_ABANDON_TIMEOUT_S = 5.0
_POLL_S = 0.01
_STOPPED = "RunStopped"


class Supervisor:
    """Sees one cell through to its end on all of its ranks.

    Args:
        engines: the engines.
        execution: the cell that was sent.
        requests: what the user asks for meanwhile.
        has_steps: whether it is a run, which can stop between two steps; another
            cell can only be interrupted.
        is_free: whether its ranks make steps without each other: a rank that dies does not
            stop the others, and each stops at a boundary of its own.
        note: takes a line for the user.
        generation: of the process group, the only one whose connections are cut.
    """

    def __init__(
        self,
        engines: Engines,
        execution: Execution | FollowedExecution,
        requests: Requests,
        *,
        has_steps: bool,
        is_free: bool = False,
        note: Callable[[str], None] = lambda _text: None,
        generation: int | None = None,
    ) -> None:
        self._generation = generation
        self._begun: set[int] = set()
        """Ranks that were in the cell when their collectives were cut; others come to it later."""
        self._engines = engines
        self._execution = execution
        self._requests = requests
        self._has_steps = has_steps
        self._is_free = is_free
        self._boundary = Boundary(engines, note, is_free=is_free)
        self._interrupts = Interrupts(engines)
        self._deadlock = Deadlock(engines)
        self.phase: str = "running"
        """running, pausing, paused, stopping or interrupting."""
        self._is_cut = False
        self._is_halted = False
        """Whether the ranks know where to stop."""
        self._released: set[int] = set()
        """Ranks whose collectives were cut before they had failed by themselves."""
        self.places: dict[int, dict[str, Any]] = {}
        """Where each of them was just before, as it said itself."""
        self.replaced: tuple[int, ...] = ()
        """Ranks whose engines answered nothing, and were killed at the user's third request."""
        self._released_s = 0.0
        self._failed_s: float | None = None
        self._num_served = 0
        self._is_cut_hard = False
        self._look_s = _PARKED_S
        self._is_pressed = False

    @property
    def is_group_broken(self) -> bool:
        """Whether the process group cannot be used any more."""
        return self._is_cut or any(failure.is_echo for failure in self._failures())

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
        names = {
            r.ename or r.status
            for r in self._execution.replies.values()
            if r.status != "ok" and not (r.status == "died" and self.has_survived)
        }
        if not names:
            return "finished"
        return "stopped" if names == {_STOPPED} or self._is_users_doing() else "failed"

    def error(self, epilogue: str = "") -> RankError | None:
        """Return what the cell failed with, None if it did not."""
        failures = self._failures()
        if not failures or self._is_users_doing() or self.has_survived:
            return None
        return RankError(tuple(sorted(failures, key=lambda f: (f.is_echo, f.rank))), epilogue)

    @property
    def has_survived(self) -> bool:
        """Whether ranks have died, and the others do without them."""
        replies = self._execution.replies.values()
        has_died = any(r.status == "died" for r in replies)
        is_well = all(r.status in ("ok", "died") or r.ename == _STOPPED for r in replies)
        is_alone = all(r.status == "died" for r in replies) and not self._execution.running
        return (
            self._is_free and has_died and is_well and not is_alone
            and not self._execution.failing and not self._is_cut
        )  # fmt: skip

    @property
    def lost(self) -> list[int]:
        """Ranks that died."""
        return [r.rank for r in self._execution.replies.values() if r.status == "died"]

    def _is_users_doing(self) -> bool:
        """Whether the ranks failed only because the user interrupted them."""
        return self._requests.is_stop and all(
            f.is_echo or f.ename == "KeyboardInterrupt" or f.rank in self.replaced
            for f in self._failures()
        )

    def _failures(self) -> list[RankFailure]:
        return [
            failure_of(
                reply,
                is_released=reply.rank in self._released,
                death=self._engines.death_of(reply.rank),
            )
            for reply in self._execution.replies.values()
            if reply.status != "ok" and reply.ename != _STOPPED
        ]

    def _serve(self) -> None:
        running = self._execution.running
        if self._is_cut:
            self._press_on(running)
        elif self._is_urgent():
            self._release(running)
        elif self._is_stranded():
            self._free(running)
        elif self._requests.is_stop and not (self._has_steps and self._requests.may_be_restart()):
            self._stop(running)
        elif self._requests.is_pause and self.phase in ("running", "pausing"):
            self.phase = "paused" if self._boundary.halt(running, "pause") else "pausing"
        elif self._requests.changes and self._has_steps:
            values = self._requests.changes.popleft()
            self._boundary.change(running, values, is_paused=self.phase == "paused")
        elif not self._requests.is_pause and self.phase in ("pausing", "paused"):
            self._boundary.resume(running)
            self.phase = "running"

    def _is_urgent(self) -> bool:
        return self._requests.num_interrupts > 1 or self._requests.is_now

    def _is_stranded(self) -> bool:
        """Whether a rank failed, so that others may wait for it in vain."""
        if self._failed_s is None:
            if self._execution.has_failed(_STOPPED):
                self._failed_s = time.monotonic()
                self._requests.alarm.ring_in(_GRACE_S)
            return False
        return time.monotonic() - self._failed_s >= _GRACE_S

    def _stop(self, ranks: tuple[int, ...]) -> None:
        if not self._is_halted:
            self.phase = "stopping"
            if self._has_steps:
                self._is_halted = self._boundary.halt(ranks, "stop")
            else:
                self._is_halted = self._interrupts.send(ranks)
        # No boundary comes where ranks wait for one that has ended the cell.
        elif self._deadlock.look(ranks, tuple(self._execution.replies)):
            self._release(ranks)

    def _free(self, ranks: tuple[int, ...]) -> None:
        """Free ranks that wait for one that failed; let those that compute come to an end alike.

        So a group is given up only if a rank does wait: a cell that is wrong
        everywhere fails everywhere, some ranks sooner than others.
        """
        is_late = self._failed_s is not None and time.monotonic() - self._failed_s > _ANSWER_S
        if self.has_survived and not self._cut(ranks, only_waiting=True):
            self._failed_s = time.monotonic() + _ANSWER_S  # one may come to a collective later
            self.places.clear()
        elif is_late or self._cut(ranks, only_waiting=True):
            self._release(ranks)
            if is_late:
                self._interrupt(ranks)
        else:
            self._requests.alarm.ring_in(_GRACE_S)

    def _release(self, ranks: tuple[int, ...]) -> None:
        """Free ranks from collectives that can never end."""
        self.phase = "interrupting"
        self._cut(ranks)
        self._is_cut = True
        self._released_s = time.monotonic()
        self._num_served = self._requests.num_interrupts
        if self._is_urgent():
            self._interrupt(ranks)

    def _cut(self, ranks: tuple[int, ...], **how: bool) -> bool:
        """Cut the links of ranks, note where they were, and return whether one was cut."""
        # A rank that has failed may still be writing its traceback.
        failing = self._execution.failing.copy()
        request = {**how, "generation": self._generation}
        answers = self._engines.control("cut", request, ranks=ranks, timeout_s=_CONTROL_TIMEOUT_S)
        self._begun.update(r for r, a in answers.items() if a.get("has_begun"))
        lost = self._engines.lost
        for rank in ranks:
            if rank not in failing and rank not in lost and not self._has_place(rank):
                self.places[rank] = answers.get(rank, {}).get("place", {})
        cut = {r for r, a in answers.items() if a.get("is_cut") and r not in failing}
        self._released |= cut
        return bool(cut)

    def _has_place(self, rank: int) -> bool:
        # The first collective counts: what a freed rank does afterwards says nothing.
        return self.places.get(rank, {}).get("state") == "collective"

    def _press_on(self, ranks: tuple[int, ...]) -> None:
        """See to ranks that were freed and go on: they are in Python, or answer nothing."""
        waited_s = time.monotonic() - self._released_s
        is_late = waited_s > _ANSWER_S
        num_asked = self._requests.num_interrupts  # the next may come while this one is served
        has_asked = num_asked > self._num_served
        if has_asked and self._num_served > 1 and is_late:
            # A rank that writes its traceback has answered: it is killed if it is all there is.
            mute = tuple(r for r in ranks if r not in self._execution.failing) or ranks
            self.replaced += mute
            self._engines.signal(signal.SIGKILL, mute)
        elif has_asked:
            self._interrupt(ranks)
        if waited_s > _PARKED_S and not self._is_cut_hard:
            self._is_cut_hard = True
            # A peer that was killed can leave a send parked that the first cut does not wake.
            self._cut(ranks, is_hard=True)
        if is_late and not self._is_pressed:
            self._is_pressed = True
            self._cut(ranks, is_hard=True)
            self._interrupt(ranks)
        if waited_s > self._look_s:
            self._look_s = waited_s + _PARKED_S
            self._catch_up(ranks)
        self._num_served = num_asked

    def _catch_up(self, ranks: tuple[int, ...]) -> None:
        """Free ranks that have begun the cell only now: the measures so far have passed them by."""
        behind = tuple(rank for rank in ranks if rank not in self._begun)
        self._cut(behind, is_hard=True)
        self._interrupt(tuple(rank for rank in behind if rank in self._begun))

    def _interrupt(self, ranks: tuple[int, ...]) -> None:
        self._engines.signal(signal.SIGINT, ranks)
