"""What the chart of a run shows, in words: for who does not see it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dtkit._text import format_loss, format_rate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dtkit.telemetry.view import RunView

    Floats = NDArray[np.float64]

__all__ = ["alt_text"]


def alt_text(view: RunView) -> str:
    """Return what the chart shows, in words and numbers."""
    loss = _last_finite(view.loss_smooth)
    if math.isnan(loss):
        first = "Loss: not known yet."
    else:
        start = _first_finite(view.loss_smooth)
        path = f"from {format_loss(start)} to {format_loss(loss)}"
        first = f"Loss over {view.step:,} steps: {path}, best {format_loss(view.best_loss)}."
    rate = _last_finite(view.rate)
    if math.isnan(rate):
        second = "Samples/s: not known yet."
    else:
        low, high = _last_finite(view.rate_low), _last_finite(view.rate_high)
        band = f"between {format_rate(low)} and {format_rate(high)} by rank"
        second = f"Samples/s: {format_rate(rate)}, {band}."
    changed = "".join(f" Changed by hand: {change}." for change in view.changes)
    return f"{first} {second}{changed}"


def _first_finite(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[0]) if len(finite) else math.nan


def _last_finite(values: Floats) -> float:
    return _first_finite(values[::-1])
