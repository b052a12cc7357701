"""The chart of a run as a picture: drawn by matplotlib, shown by an `ipywidgets.Image`."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from dtkit._text import OVER
from dtkit.views.alt import alt_text

if TYPE_CHECKING:
    from dtkit.telemetry.view import RunView

__all__ = ["PictureChart"]


class PictureChart:
    """Loss and samples/s, side by side."""

    def __init__(self) -> None:
        from dtkit.views.chart import Chart  # matplotlib takes half a second

        self._chart = Chart()
        self._drawn: tuple[object, ...] = ()

    def build(self) -> Any:  # Any: ipywidgets has no annotations
        """Return the widget to be displayed."""
        import ipywidgets as w

        self._image = w.Image(layout=w.Layout(width="740px", height="240px", margin="4px 0"))
        # An Image has no alt, and a tooltip breaks it (ipywidgets 8.1): the words stand beside it.
        self._alt = w.HTML(layout=w.Layout(height="0", margin="0"))
        return w.VBox([self._image, self._alt], layout=w.Layout(width="100%", margin="0"))

    def draw(self, view: RunView, *, log_scale: bool) -> None:
        """Draw the run as it is now, if that is something new."""
        drawn = (view.step, view.state in OVER, log_scale, len(view.changes))
        if drawn != self._drawn:
            self._drawn = drawn
            self._image.value = self._chart.render(view, log_scale=log_scale)
            self._alt.value = f'<div role="img" aria-label="{escape(alt_text(view))}"></div>'
