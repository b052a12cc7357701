"""Samples a second, as they come and over a run."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dtkit.telemetry._series import Rows

__all__ = ["Arrivals", "rate_of", "rate_of_all"]

_RECENT_S = 2.0


class Arrivals:
    """When samples came, lately: for a rate that follows what happens now.

    It begins with the end of the first step, which loads what the others find there.
    """

    def __init__(self) -> None:
        self.num_samples = 0.0
        self._points: deque[tuple[float, float]] = deque()  # seconds, and samples so far
        self._first_ms = math.nan

    def add(self, rows: Rows, num_samples: float) -> None:
        """Note that rows have come, with so many samples in them."""
        if not self._points:
            self._points.append(
                (float(rows["time_s"][0]), float(np.nan_to_num(rows["samples"][0])))
            )
            self._first_ms = float(rows["step_ms"][0])
        self.num_samples += num_samples
        now_s = float(rows["time_s"][-1])
        self._points.append((now_s, self.num_samples))
        # Two are kept, whatever their age: a rate lies between two points.
        while self._points[1][0] < now_s - _RECENT_S:
            self._points.popleft()

    def rate(self) -> float:
        """Return samples/s of the last seconds."""
        if not self._points:
            return math.nan
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        if t1 == t0:  # there is no other
            return rate_of(n1, self._first_ms)
        return rate_of(n1 - n0, 1000.0 * (t1 - t0))


def rate_of(samples: float, ms: float) -> float:
    return float(1000.0 * samples / ms) if ms > 0 and samples > 0 else math.nan


def rate_of_all(rows: Rows) -> float:
    """Return samples/s of a whole run, but for its first step if there are others."""
    first = min(1, max(0, rows.num - 1))
    samples, ms = rows["samples"][first:], rows["step_ms"][first:]
    return rate_of(float(np.nansum(samples)), float(np.nansum(ms)))
