"""What is new of a run since it was last asked: for writers that follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dtkit.telemetry._series import Rows

    Floats = NDArray[np.float64]

__all__ = ["News", "metrics_within", "newest", "ratio", "rows_from"]


@dataclass(frozen=True, slots=True)
class News:
    """Merged steps, logged metrics and peaks of memory that a follower has not had yet."""

    rows: dict[str, Floats]
    """(num_rows,) float64 each: the columns of merged steps."""
    metrics: dict[str, Floats]
    """(num_points, 3) float64 each: step, seconds since the start, mean over the ranks."""
    peaks_gib: dict[int, float]
    """By rank, of all the run so far."""
    step: int
    """The newest merged step."""
    time_s: float
    """Seconds since the run's start; of a run that is over, its end."""


def rows_from(rows: Rows, first: int) -> dict[str, Floats]:
    """Return the columns of a table from its row `first` on, copied, and those that follow."""
    found = {name: rows[name][first:].copy() for name in rows.names}
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = 1000.0 * found["samples"] / found["step_ms"]
    found["samples_per_s"] = np.where(found["samples"] > 0, rate, np.nan)
    found["compute_ms"] = found["step_ms"] - found["data_ms"] - found["comm_ms"]
    return found


def metrics_within(
    logged: Mapping[str, Mapping[int, tuple[float, float]]],
    time_s: Mapping[int, float],
    low: int,
    high: int | None,
) -> dict[str, Floats]:
    """Return what was logged in steps above `low`, and up to `high` if that is given."""
    found = {}
    for name, values in logged.items():
        steps = range(low + 1, high + 1) if high is not None else [s for s in values if s > low]
        points = [(step, time_s[step], ratio(*values[step])) for step in steps if step in values]
        if points:
            found[name] = np.array(points, dtype=np.float64)
    return found


def newest(values: Mapping[int, tuple[float, float]]) -> float:
    """Return the value of the last step, mean over the ranks."""
    return ratio(*values[max(values)])


def ratio(total: float, count: float) -> float:
    """Return their quotient; NaN where an estimated denominator is not positive."""
    return total / count if count > 0 else math.nan
