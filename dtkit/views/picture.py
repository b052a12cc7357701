"""The charts of a run as a picture, drawn by matplotlib, and the buttons that choose what it shows.

The same curves as in the browser's charts, and the same choices: what is drawn on either side, a
log scale, smoothing, a part of the steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from dtkit.events import OVER
from dtkit.views.alt import alt_text
from dtkit.views.controls import CANNOT_CLICK, switch
from dtkit.views.look import FIRST, Look

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView

__all__ = ["PictureChart"]

_SMOOTHINGS = {0.0: "off", 0.8: "0.8", 0.9: "0.9", 0.98: "0.98"}
_PARTS = {1.0: "all", 0.5: "last half", 0.1: "last tenth"}
_WORDS_STYLE = (
    "font-size:12px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;padding:0 8px"
)


class PictureChart:
    """Two curves side by side: loss and samples/s, until others are chosen.

    Args:
        curves: returns all that can be drawn; what the view has is drawn anyway.
        on_switch: called when something else was chosen.
        can_click: tells whether clicks are served now.
    """

    def __init__(
        self,
        curves: Callable[[], Mapping[str, Curve]],
        on_switch: Callable[[], None],
        *,
        can_click: Callable[[], bool],
    ) -> None:
        from dtkit.views.chart import Chart  # matplotlib takes half a second

        self._chart = Chart()
        self._curves, self._on_switch, self._can_click = curves, on_switch, can_click
        self._names: list[str] = list(FIRST)
        self._drawn: tuple[object, ...] = ()
        self.look: Look = Look()

    def build(self) -> Any:  # Any: ipywidgets has no annotations
        """Return the widget to be displayed."""
        import ipywidgets as w

        def button(width_px: int, press: Callable[[], None], words: str = "") -> Any:
            layout = w.Layout(width=f"{width_px}px", flex="0 0 auto", margin="0 4px 0 0")
            made = w.Button(description=words, layout=layout)
            made.on_click(lambda _: press())
            return made

        self._turns = [
            button(32, partial(self._turn, side, by), "◀" if by < 0 else "▶")
            for side in (0, 1)
            for by in (-1, 1)
        ]
        self._log = button(100, lambda: self._choose(log_scale=not self.look.log_scale))
        self._smooth = button(
            110, lambda: self._choose(smoothing=_after(_SMOOTHINGS, self.look.smoothing))
        )
        self._part = button(124, lambda: self._choose(part=_after(_PARTS, self.look.part)))
        room = {"flex": "1 1 0", "min_width": "0", "margin": "0"}
        self._says = [w.HTML(layout=w.Layout(**room)) for _ in range(2)]
        left, right = self._turns[:2], self._turns[2:]
        bar = w.HBox(
            [*left, self._says[0], self._log, self._smooth, self._part, self._says[1], *right],
            layout=w.Layout(width="740px", max_width="100%", margin="0", align_items="center"),
        )
        self._image = w.Image(layout=w.Layout(width="740px", height="240px", margin="4px 0"))
        # An Image has no alt, and a tooltip breaks it (ipywidgets 8.1): the words stand beside it.
        self._alt = w.HTML(layout=w.Layout(height="0", margin="0"))
        self._show_choices()
        return w.VBox([bar, self._image, self._alt], layout=w.Layout(width="100%", margin="0"))

    def draw(self, view: RunView) -> None:
        """Draw the run as it is now, if that is something new."""
        look = self.look
        metrics = tuple(view.metrics.items()) if look.names != FIRST else ()
        drawn = (view.step, view.state in OVER, look, len(view.changes), *metrics)
        if drawn == self._drawn:
            return
        self._drawn = drawn
        curves = self._curves()
        self._names = list(dict.fromkeys((*FIRST, *curves)))  # those stand there even when empty
        self._image.value = self._chart.render(view, look, curves)
        words = alt_text(view, look.drawn(self._names), curves)
        self._alt.value = f'<div role="img" aria-label="{escape(words)}"></div>'
        self._show_choices()

    def _turn(self, side: int, by: int) -> None:
        at = self._names.index(self.look.drawn(self._names)[side]) + by
        names = list(self.look.names)
        names[side] = self._names[at % len(self._names)]
        self._choose(names=tuple(names))

    def _choose(self, **chosen: Any) -> None:
        self.look = replace(self.look, **chosen)
        self._show_choices()
        self._on_switch()

    def _show_choices(self) -> None:
        look, can_click = self.look, self._can_click()
        self._log.description = switch("log scale", is_on=look.log_scale)
        self._smooth.description = f"smooth: {_SMOOTHINGS[look.smoothing]}"
        self._part.description = f"steps: {_PARTS[look.part]}"
        tips = {
            self._log: "logarithmic axes, but for samples/s",
            self._smooth: "a line more, smoothed with this weight of the past",
            self._part: "which steps are drawn",
        }
        for i, button in enumerate(self._turns):
            way, side = ("before", "after")[i % 2], ("left", "right")[i // 2]
            tips[button] = f"{side} chart: the one {way}"
        for button, tip in tips.items():
            button.disabled = not can_click
            button.tooltip = tip if can_click else CANNOT_CLICK
        drawn = look.drawn(self._names)
        for says, name, align in zip(self._says, drawn, ("left", "right"), strict=True):
            at = f"{self._names.index(name) + 1} of {len(self._names)}"
            says.value = f'<div style="{_WORDS_STYLE};text-align:{align}">{at}</div>'


def _after(values: Mapping[float, str], present: float) -> float:
    known = list(values)
    return known[(known.index(present) + 1) % len(known)]
