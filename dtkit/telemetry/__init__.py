"""The driver's record of a run: events in, immutable views and history out."""

from dtkit.telemetry._series import smoothed
from dtkit.telemetry.history import History
from dtkit.telemetry.news import News
from dtkit.telemetry.state import RunState
from dtkit.telemetry.view import ControlChange, ControlView, Curve, RankView, RunView

__all__ = [
    "ControlChange",
    "ControlView",
    "Curve",
    "History",
    "News",
    "RankView",
    "RunState",
    "RunView",
    "smoothed",
]
