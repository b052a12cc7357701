"""Passes: which synchronizer communicates in which backward pass, and in what order."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.engine.reduce.buckets import Bucket
    from dtkit.engine.reduce.synchronizer import GradSynchronizer

__all__ = ["Passes"]


class Passes:
    """Counts backward passes, and lets each synchronizer communicate in the right one.

    Ranks must agree on every collective. So what is sent in a pass is decided
    by what all ranks do alike, the calls of `backward()` and `step()`, and
    never by which gradients came: a rank may have none for a whole model.

    Averaging is linear and leaves an average as it is. So it is enough that a
    synchronizer communicates once after the last pass before its gradients are
    used. It is due in as many passes after a step as the step before took; if
    that guess is wrong, `flush` makes up for it before the gradients are used.

    Args:
        on_wait: called with the seconds that a pass had to wait for other ranks.
        is_deferred: whether to communicate in no pass, but when `flush` asks for it:
            gradients of several passes are put together elsewhere before.
    """

    def __init__(
        self,
        on_wait: Callable[[float], None] = lambda _seconds: None,
        *,
        is_deferred: bool = False,
    ) -> None:
        self.num_begun: int = 0
        self.is_open: bool = False
        self._on_wait = on_wait
        self._is_deferred = is_deferred
        # Holding them: one that lived on some ranks only (cyclic garbage goes when
        # it likes) would be missed by the others.
        self._due: dict[int, list[GradSynchronizer]] = {}
        self._members: list[GradSynchronizer] = []
        self._line: list[Bucket] = []
        self._num_launched = 0
        self._numbers = itertools.count()

    def left_to_horovod(self) -> None:
        """Raise if gradients were to be put together: Horovod averages in every pass."""
        if self._is_deferred:
            msg = (
                "--accumulate: hvd.DistributedOptimizer averages by itself: give it "
                "backward_passes_per_step=K in the cell, and leave the flag out"
            )
            raise RuntimeError(msg)

    def next_number(self) -> int:
        """Return a synchronizer's place among all: its number of creation."""
        return next(self._numbers)

    def schedule(self, synchronizer: GradSynchronizer, pass_number: int) -> None:
        """Let a synchronizer communicate in that pass, and not before."""
        if self._is_deferred:
            return
        synchronizer.due = pass_number
        self._due.setdefault(pass_number, []).append(synchronizer)

    def begin(self) -> None:
        """Begin a pass. Call it before `backward()`, or see `begin_in_engine`."""
        self.num_begun += 1
        self.is_open = True
        # Each once: a schedule may have been changed, and changed back.
        due = dict.fromkeys(self._due.pop(self.num_begun, []))
        self._members = [s for s in due if s.due == self.num_begun]
        self._line = [bucket for s in self._members for bucket in s.prepare()]
        self._num_launched = 0

    def begin_in_engine(self) -> None:
        """Begin a pass that nobody announced: its first gradient has just come."""
        self.begin()
        torch.autograd.Variable._execution_engine.queue_callback(self.end)  # noqa: SLF001

    def advance(self) -> None:
        """Launch buckets that are full, in order whatever order they fill up in."""
        while self._num_launched < len(self._line):
            bucket = self._line[self._num_launched]
            if not bucket.is_full:
                return
            bucket.launch()
            self._num_launched += 1

    def end(self) -> None:
        """End the pass: when this returns, the gradients that were due are averages."""
        self.is_open = False
        members, self._members = self._members, []
        if members:
            self._finish(members, self._line, self._num_launched)
        self._line = []

    def abort(self) -> None:
        """End a pass that failed."""
        self.is_open = False
        for member in self._members:
            member.forget_buckets()
        self._members, self._line = [], []

    def flush(self, synchronizers: Sequence[GradSynchronizer]) -> None:
        """Average now what was changed since it was averaged last."""
        if self.is_open:  # a pass that failed and was not aborted
            self.abort()
        dirty = [s for s in synchronizers if s.is_dirty]
        if dirty:
            self._finish(dirty, [bucket for s in dirty for bucket in s.prepare()], 0)

    def close(self) -> None:
        """Forget everything."""
        self.abort()
        self._due.clear()

    @torch.no_grad()
    def _finish(
        self, members: Sequence[GradSynchronizer], line: Sequence[Bucket], num_launched: int
    ) -> None:
        start = time.perf_counter()
        for bucket in line[num_launched:]:
            bucket.launch()
        for bucket in line[:num_launched]:
            bucket.relaunch_if_stale()
        for member in members:
            member.finish()
        self._on_wait(time.perf_counter() - start)
