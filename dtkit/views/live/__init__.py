"""The charts of a run in the browser: any curve, log scale, smoothing, zoom; needs `dtkit[live]`.

uPlot, which draws them, lies beside this file with its licence, so that nothing comes from the net.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit.events import OVER
from dtkit.views.alt import alt_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView

__all__ = ["LiveChart", "can_live", "packed"]

_HERE = Path(__file__).parent
_SCRIPTS = ("uPlot.iife.min.js", "keys.js", "chart.js")


def can_live() -> bool:
    """Return whether the package that carries the charts to the browser is installed."""
    return find_spec("anywidget") is not None


class LiveChart:
    """Two charts side by side; what is in them, and how, is chosen in the browser.

    Args:
        curves: returns all that can be drawn.
    """

    def __init__(self, curves: Callable[[], Mapping[str, Curve]]) -> None:
        self._curves = curves
        self._widget: Any = None
        self._sent: tuple[object, ...] = ()
        self.is_drawn: bool = False
        """Whether the browser has said that it draws it; it may lack what that takes."""

    def build(self) -> Any:  # Any: anywidget is there or not
        """Return the widget to be displayed."""
        self._widget = _widget_class()(data=b"", layout_of=[], alt="")
        self._widget.on_msg(self._hear)
        return self._widget

    def draw(self, view: RunView) -> None:
        """Hand the curves over if there is something new: all, so that a reloaded page has all."""
        now = (view.step, view.state in OVER, len(view.changes), *view.metrics.items())
        if now == self._sent:
            return
        self._sent = now
        layout, data = packed(self._curves())
        with self._widget.hold_sync():
            self._widget.alt = alt_text(view)
            self._widget.layout_of = layout
            self._widget.marks = [[change.step, change.what] for change in view.changes]
            self._widget.data = data

    def _hear(self, _widget: object, content: object, _buffers: object) -> None:
        self.is_drawn = self.is_drawn or content == "drawn"


def packed(curves: Mapping[str, Curve]) -> tuple[list[Any], bytes]:
    """Return curves as the browser takes them.

    Returns:
        For each chart its name, its lines' labels and its number of points; and float32,
        of each chart in turn the steps and then line by line.
    """
    layout = [[name, list(curve.lines), len(curve.step)] for name, curve in curves.items()]
    parts = [part for curve in curves.values() for part in (curve.step, *curve.lines.values())]
    return layout, np.concatenate(parts).astype(np.float32).tobytes() if parts else b""


def _widget_class() -> Any:
    from anywidget import AnyWidget
    from traitlets import Bytes, List, Unicode

    # uPlot's file makes a name for the script that follows it.
    script = "".join((_HERE / name).read_text() for name in _SCRIPTS)

    class Charts(AnyWidget):
        _esm = script
        _css = (_HERE / "uPlot.min.css").read_text() + (_HERE / "chart.css").read_text()
        layout_of: Any = List().tag(sync=True)
        data = Bytes().tag(sync=True)
        marks: Any = List().tag(sync=True)
        alt = Unicode().tag(sync=True)

    return Charts
