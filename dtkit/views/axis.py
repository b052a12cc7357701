"""Axis limits that hold still while a curve grows, and ticks as short text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Limits", "labels", "log_ticks", "step_end", "step_range", "ticks"]

_MIN_STEPS = 20
_MIN_FILL = 0.35
"""Part of the axis that the data must fill; below it the limits shrink."""
_MARGIN, _ROOM = 0.06, 0.25
"""Parts of the data's span left free: always, and on the side where it grew."""
_MIN_TICKS = 3
"""Fewer do not show a scale."""
_PLAIN = (1e-3, 1e12)
"""Between these, numbers are written without an exponent."""
_UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""From which size on, divided by what, with which letter."""


@dataclass(slots=True)
class Limits:
    """Limits of one axis that change rarely: they leave room where the data grew."""

    low: float = math.nan
    high: float = math.nan

    def fit(self, low: float, high: float, *, floor: float, is_tight: bool) -> bool:
        """Make room for `low` to `high`; return whether the limits changed.

        Args:
            low: least value that must be inside.
            high: greatest value that must be inside.
            floor: value that the axis never goes below.
            is_tight: fit closely, because the data will not grow any more.
        """
        span = (high - low) or abs(high) * 0.1 or 1.0
        is_inside = self.low <= low and high <= self.high
        if is_inside and span >= _MIN_FILL * (self.high - self.low) and not is_tight:
            return False
        room = _MARGIN if is_tight else _ROOM
        grew_down, grew_up = low < self.low, high > self.high
        before = (self.low, self.high)
        self.low = max(floor, low - (room if grew_down else _MARGIN) * span)
        self.high = high + (room if grew_up else _MARGIN) * span
        return before != (self.low, self.high)


def step_end(step: int, total_steps: int | None, *, is_over: bool) -> float:
    """Return where the step axis ends: with the run, before that at 20, 30, 50, 100, 200."""
    if is_over:
        return float(max(step, 1))
    magnitude = 10 ** math.floor(math.log10(max(step, _MIN_STEPS)))
    nice = (m * magnitude for m in (1, 2, 3, 5, 10))
    end = next(n for n in nice if n >= max(step, _MIN_STEPS))
    return float(min(end, total_steps) if total_steps and total_steps >= step else end)


def step_range(
    step: int, total_steps: int | None, part: float, *, is_over: bool
) -> tuple[float, float]:
    """Return from where to where the step axis goes: over all, or over the newest `part`."""
    if part >= 1:
        return 0.0, step_end(step, total_steps, is_over=is_over)
    # In tenths of what is shown: it holds still while the curve grows through one.
    unit = 10.0 ** max(0, math.floor(math.log10(max(step * part, 1))) - 1)
    low = math.floor(step * (1 - part) / unit) * unit
    high = step if is_over else math.ceil((step + 1) / unit) * unit
    return low, float(max(high, low + 1))


def ticks(low: float, high: float, num: int, *, is_integer: bool = False) -> list[float]:
    """Return about `num` round numbers from `low` to `high`."""
    locator = MaxNLocator(num, steps=[1, 2, 2.5, 5, 10], integer=is_integer)
    margin = 1e-9 * (high - low)
    return [float(t) for t in locator.tick_values(low, high) if low - margin <= t <= high + margin]


def log_ticks(low: float, high: float) -> list[float]:
    """Return ticks between 10**low and 10**high: decades, or 1-2-5, or evenly spaced."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.ceil((high - low) / 5))
    coarse = [10.0**d for d in decades if low <= d <= high and d % every == 0]
    if len(coarse) >= _MIN_TICKS:
        return coarse
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= d + math.log10(m) <= high]
    return fine if len(fine) >= _MIN_TICKS else ticks(10**low, 10**high, 4)


def labels(values: Sequence[float]) -> list[str]:
    """Return ticks as short text: evenly spaced ones in one unit, with the same decimals."""
    largest = max((abs(v) for v in values), default=0.0)
    gaps = [b - a for a, b in pairwise(values)]
    is_even = bool(gaps) and max(gaps) - min(gaps) < 1e-6 * largest
    if not is_even or not _PLAIN[0] <= largest < _PLAIN[1]:
        return [f"{v:.3g}" for v in values]
    unit, suffix = next(((u, s) for limit, u, s in _UNITS if largest >= limit), (1.0, ""))
    gap = gaps[0] / unit
    decimals = next((d for d in range(7) if abs(round(gap, d) - gap) < 1e-6 * gap), 6)
    return [f"{v / unit:,.{decimals}f}{suffix}" if v else "0" for v in values]
