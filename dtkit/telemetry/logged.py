"""What the cell gives to `dtkit.log`: by metric and step, summed over the ranks."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import LogBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.telemetry._series import Rows

__all__ = ["Logged"]


class Logged:
    """Metrics of a run.

    Args:
        rows: the run's.
        ended_s: returns when a rank's step ended, since the run's start; inf: not yet; NaN: it
            is not kept.
        is_free: whether its ranks make steps without each other: a metric belongs to the row of
            its rank's step, and waits for it.

    Attributes:
        values: by metric and step, the sum over the ranks and how many they were.
        time_s: by step, when it was logged, since the run's start.
        staleness: how many steps of free ranks were made without so many updates of others.
    """

    def __init__(self, rows: Rows, ended_s: Callable[[int, int], float], *, is_free: bool) -> None:
        self.values: dict[str, dict[int, tuple[float, float]]] = {}
        self.time_s: dict[int, float] = {}
        self.staleness: Counter[int] = Counter()
        self._rows, self._ended_s, self._is_free = rows, ended_s, is_free
        self._early: list[LogBatch] = []

    def take(self, event: LogBatch, *, is_over: bool) -> None:
        """Take what a rank has logged.

        Args:
            event: that.
            is_over: whether all ranks have ended, so that no row will come any more.
        """
        for i, time_s in enumerate(event.time_s):
            step = self._step_of(event, i) if self._is_free else event.step[i]
            if step is None and not is_over:
                rest = (event.step[i:], event.time_s[i:], event.metrics[i:])
                self._early.append(LogBatch(event.rank, *rest))
                return
            step = self.step_at(time_s) if step is None else step
            self.time_s[step] = time_s
            for name, value in event.metrics[i].items():
                total, count = self.values.setdefault(name, {}).get(step, (0.0, 0))
                more, weight = value if isinstance(value, list) else (value, 1)
                self.values[name][step] = (total + more, count + weight)
                if name == "staleness" and self._is_free:
                    self.staleness[int(more)] += 1

    def settle(self, *, is_over: bool) -> None:
        """Take what has waited for rows that may be there now."""
        early, self._early = self._early, []
        for event in early:
            self.take(event, is_over=is_over)

    def step_at(self, time_s: float) -> int:
        """Return which step of free ranks was under way then."""
        return max(1, int(np.searchsorted(self._rows["time_s"], time_s, side="right")))

    def _step_of(self, event: LogBatch, index: int) -> int | None:
        """Return the row of the step that a metric belongs to; None: it is not there yet."""
        time_s = self._ended_s(event.rank, event.step[index])
        if math.isnan(time_s):  # before the first step, too
            time_s = event.time_s[index]
        is_here = self._rows.num > 0 and time_s <= self._rows["time_s"][-1]
        return self.step_at(time_s) if is_here else None
