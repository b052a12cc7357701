"""In what order the steps of the ranks become rows of a run."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import STEP_COLUMNS
from dtkit.telemetry._merge import merge_steps
from dtkit.telemetry._series import WINDOW, Rows, rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dtkit.telemetry._series import RankSeries, Smoother

    Floats = NDArray[np.float64]

__all__ = ["InStep", "InTime", "Order"]

_SLACK_S = 2.0
"""How long a row is kept back for steps of other ranks that ended before it."""


class Order:
    """Makes rows of steps that have come.

    Args:
        ranks: the ranks.
        rings: theirs, as `new_rings` made them.
        smoother: continues the smoothed loss.
    """

    def __init__(self, ranks: Sequence[RankSeries], rings: Floats, smoother: Smoother) -> None:
        self.step: int = 0
        """Of the newest row."""
        self._ranks, self._rings, self._smooth = ranks, rings, smoother

    def take(self) -> Floats:
        """Return the rows that are new, (num_columns, num_rows); see `Rows`."""
        raise NotImplementedError


_STEP = attrgetter("step")


class InStep(Order):
    """Ranks in step: a row for each step that all ranks have made."""

    def __init__(self, ranks: Sequence[RankSeries], rings: Floats, smoother: Smoother) -> None:
        super().__init__(ranks, rings, smoother)
        self._late = ranks[0]
        """Of the ranks that were waited for last, the one that was furthest behind."""

    def take(self) -> Floats:
        furthest = max(map(_STEP, self._ranks))
        is_waiting = self._late.step <= self.step and not self._late.is_over()
        if is_waiting and furthest - WINDOW <= self.step:  # of many ranks nearly always
            return np.empty((len(Rows.names), 0))
        waiting = [r for r in self._ranks if not r.is_over()]
        self._late = min(waiting, key=_STEP, default=self._late)
        done = self._late.step if waiting else furthest
        done = max(done, furthest - WINDOW)
        if done <= self.step:
            return np.empty((len(Rows.names), 0))
        steps = np.arange(max(self.step, done - WINDOW) + 1, done + 1)
        self.step = done
        block = rows_of(self._rings, steps)  # (ranks, columns, steps)
        block = block[:, :, ~np.isnan(block[:, 0, :]).all(axis=0)]
        return merge_steps(block, self._smooth)


class InTime(Order):
    """Ranks that make steps without each other: a row for each step of each, as they ended.

    So a row's samples over its time is what all ranks do together, and the loss over rows
    is that over all steps that were made.
    """

    def __init__(self, ranks: Sequence[RankSeries], rings: Floats, smoother: Smoother) -> None:
        super().__init__(ranks, rings, smoother)
        self._taken = [0] * len(ranks)
        self._last_s = -np.inf

    def take(self) -> Floats:
        running = [r.last_s for r in self._ranks if not r.is_over()]
        newest_s = max(r.last_s for r in self._ranks)
        until_s = max(min(running), newest_s - _SLACK_S) if running else np.inf
        found = [self._of(i, until_s) for i in range(len(self._ranks))]
        block = np.concatenate(found, axis=1)
        column = {name: i for i, name in enumerate(STEP_COLUMNS)}
        block = block[:, np.argsort(block[column["time_s"]], kind="stable")]
        if not block.shape[1]:
            return np.empty((len(Rows.names), 0))
        rows = merge_steps(block[None], self._smooth)
        at = {name: i for i, name in enumerate(Rows.names)}
        own_ms = rows[at["step_ms"]].copy()
        if self.step == 0:
            self._last_s = rows[at["time_s"]][0] - own_ms[0] / 1000
        ends = np.maximum.accumulate(np.append(self._last_s, rows[at["time_s"]]))
        rows[at["time_s"]], self._last_s = ends[1:], ends[-1]
        rows[at["step_ms"]] = 1000 * np.diff(ends)
        for name in ("data_ms", "comm_ms"):  # their share of the rank's step
            share = np.divide(rows[at[name]], own_ms, out=np.zeros_like(own_ms), where=own_ms > 0)
            rows[at[name]] = share * rows[at["step_ms"]]
        for name in ("rate_low", "rate_high"):
            rows[at[name]] *= len(self._ranks)
        rows[at["step"]] = self.step + 1 + np.arange(rows.shape[1])
        self.step += rows.shape[1]
        return rows

    def _of(self, index: int, until_s: float) -> Floats:
        """Return a rank's steps that ended until then, and were not taken."""
        rank = self._ranks[index]
        first = max(self._taken[index], rank.step - WINDOW) + 1
        block = rank.rows(np.arange(first, rank.step + 1))
        block = block[:, ~np.isnan(block[0])]
        block = block[:, block[STEP_COLUMNS.index("time_s")] <= until_s]
        if block.shape[1]:
            self._taken[index] = int(block[0].max())
        return block
