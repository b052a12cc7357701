"""What the chart of a run shows, in words: for who does not see it."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from dtkit._format import format_loss, format_rate
from dtkit.views.look import FIRST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView

    Floats = NDArray[np.float64]

__all__ = ["alt_text"]

_NONE: Mapping[str, Curve] = MappingProxyType({})


def alt_text(
    view: RunView, names: Sequence[str] = FIRST, curves: Mapping[str, Curve] = _NONE
) -> str:
    """Return what the chart shows, in words and numbers.

    Args:
        view: the run.
        names: what is drawn of it.
        curves: the curves of those names that are not in the view.
    """
    said = [
        _of_loss(view)
        if name == FIRST[0]
        else _of_rate(view)
        if name == FIRST[1]
        else _of_curve(name, curves[name])
        for name in names
    ]
    return " ".join(said) + "".join(f" Changed by hand: {change}." for change in view.changes)


def _of_loss(view: RunView) -> str:
    smooth = view.loss_curve.lines["smoothed"]
    loss = _last_finite(smooth)
    if math.isnan(loss):
        return "Loss: not known yet."
    path = f"from {format_loss(_first_finite(smooth))} to {format_loss(loss)}"
    return f"Loss over {view.step:,} steps: {path}, best {format_loss(view.best_loss)}."


def _of_rate(view: RunView) -> str:
    rate, low, high = map(_last_finite, view.rate_curve.lines.values())
    if math.isnan(rate):
        return "Samples/s: not known yet."
    band = f"between {format_rate(low)} and {format_rate(high)} by rank"
    return f"Samples/s: {format_rate(rate)}, {band}."


def _of_curve(name: str, curve: Curve) -> str:
    ends = [
        f"{label} from {_first_finite(line):.4g} to {_last_finite(line):.4g}"
        for label, line in curve.lines.items()
        if np.isfinite(line).any()
    ]
    return f"{name[0].upper()}{name[1:]} over {curve.step[-1]:,.0f} steps: {', '.join(ends)}."


def _first_finite(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[0]) if len(finite) else math.nan


def _last_finite(values: Floats) -> float:
    return _first_finite(values[::-1])
