"""How often a dashboard draws: so that the notebook's process stays within a part of a core."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Clock = Callable[[], float]

__all__ = ["Budget", "Pace"]

_SHARE = 0.04
"""Of a core, for all that the process does while it shows a run."""
_LEAST = 0.01
"""For drawing, whatever the rest takes: of many ranks, reading what they send."""
_FIRST_LOOK_S, _LOOK_S = 0.5, 2.0
_MAX_REST_S = 5.0


class Budget:
    """What a dashboard may take of a core: what the rest of the process leaves of `_SHARE`.

    Args:
        clock: seconds that pass.
        thread_clock: seconds that this thread computed.
        process_clock: seconds that all threads of the process did.
    """

    def __init__(
        self,
        clock: Clock = time.monotonic,
        thread_clock: Clock = time.thread_time,
        process_clock: Clock = time.process_time,
    ) -> None:
        self.clock = clock
        self._thread_clock = thread_clock
        self._process_clock = process_clock
        self._left = _SHARE
        self._look_s = _FIRST_LOOK_S
        self.begin()

    def begin(self) -> None:
        """Count from now on: what came before, such as modules that were loaded, is over."""
        self._since_s, self._since_cpu_s = self.clock(), self._process_clock()
        self._spent_s = 0.0

    def spend(self, draw: Callable[[], None]) -> float:
        """Draw, and return what it has cost this thread, in seconds."""
        before_s = self._thread_clock()
        draw()
        cost_s = self._thread_clock() - before_s
        self._spent_s += cost_s
        return cost_s

    def left(self) -> float:
        """Return the part of a core that is left for drawing."""
        passed_s = self.clock() - self._since_s
        if passed_s >= self._look_s:
            other_s = self._process_clock() - self._since_cpu_s - self._spent_s
            self._left = min(max(_SHARE - other_s / passed_s, _LEAST), _SHARE)
            self._look_s = _LOOK_S
            self.begin()
        return self._left


class Pace:
    """Says when to draw next: not too often, and not for more than a part of the budget.

    Args:
        interval_s: seconds from one drawing to the next, at least.
        budget: the dashboard's.
        part: of it that this drawing may take.
    """

    def __init__(self, interval_s: float, budget: Budget, part: float = 1.0) -> None:
        self._interval_s = interval_s
        self._budget = budget
        self._part = part
        self._next_s = budget.clock()

    def is_due(self) -> bool:
        """Return whether the rest is over."""
        return self._budget.clock() >= self._next_s

    def hurry(self) -> None:
        """End the rest: something was clicked. Safe to call from any thread."""
        self._next_s = self._budget.clock()

    def run(self, draw: Callable[[], None]) -> None:
        """Draw, and rest in proportion to what it cost this thread."""
        cost_s = self._budget.spend(draw)
        rest_s = min(cost_s / (self._part * self._budget.left()), _MAX_REST_S)
        self._next_s = self._budget.clock() + max(self._interval_s, rest_s)
