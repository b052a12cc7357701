"""The panel's live controls: sliders and boxes in the browser, buttons where there are none."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from dtkit.events import OVER
from dtkit.livecontrol import LR_FACTOR
from dtkit.livecontrol import shown as text_of
from dtkit.views.controls import CANNOT_CLICK
from dtkit.views.live.sliders import LiveSliders

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.livecontrol import LiveControl, Value
    from dtkit.telemetry.view import ControlView, RunView

__all__ = ["Steering", "moved"]

_PARTS = 10
"""Presses of a button from one end of a range to the other."""
_PATIENCE_DRAWS = 12


class Steering:
    """Shows live controls, and tells when one was moved.

    Only clicks are served while a cell runs (see `WidgetDashboard`), so where the browser cannot
    draw sliders of our own, two buttons move a value down and up.

    Args:
        on_control: called with a control's name and its new value.
        can_click: tells whether clicks are served now.
    """

    def __init__(
        self, on_control: Callable[[str, Value], None], *, can_click: Callable[[], bool]
    ) -> None:
        self._on_control, self._can_click = on_control, can_click
        self._box: Any = None  # ipywidgets has no annotations
        self._sliders: LiveSliders | None = None
        self._rows: dict[str, _Row] = {}

    def build(self, *, is_live: bool) -> Any:
        """Return the widget to be displayed."""
        import ipywidgets as w

        self._says = w.HTML(layout=w.Layout(margin="0"))
        self._box = w.VBox([self._says], layout=w.Layout(width="100%", margin="0"))
        if is_live:
            self._sliders = LiveSliders(self._move)
            self._box.children = (self._says, self._sliders.build())
        return self._box

    def use_buttons(self) -> None:
        """Show buttons instead of sliders, which the front end cannot draw."""
        if self._sliders is not None:
            self._sliders.close()
            self._sliders = None
            self._box.children = (self._says,)

    def draw(self, view: RunView) -> None:
        """Show the controls as they are now."""
        can_click = self._can_click()
        is_on = can_click and view.state not in OVER
        hint = "" if can_click else f"{CANNOT_CLICK}; %dist_control works from elsewhere"
        self._says.value = f"<small>{escape(hint)}</small>" if hint else ""
        if self._sliders is not None:
            self._sliders.draw(view, is_on=is_on)
            return
        for shown in view.controls:
            name = shown.control.name
            if name not in self._rows:
                self._rows[name] = _Row(shown.control, self._move)
                rows = (row.box for row in self._rows.values())
                self._box.children = (self._says, *rows)
            self._rows[name].draw(shown, effect_of(shown, view), is_on=is_on)

    def _move(self, name: str, value: Value) -> None:
        self._on_control(name, value)


def effect_of(shown: ControlView, view: RunView) -> str:
    """Return what a control's value comes to, if there is a number that says it."""
    return f"lr {view.lr:.3g}" if shown.control.name == LR_FACTOR.name and view.step else ""


class _Row:
    """A control's name and value, and two buttons that move it."""

    def __init__(self, control: LiveControl, on_move: Callable[[str, Value], None]) -> None:
        import ipywidgets as w

        self._control, self._on_move = control, on_move
        self._value: Value = control.default
        self._asked: Value | None = None
        self._num_draws = 0
        small = {"width": "36px", "flex": "0 0 auto", "margin": "0 4px 0 0"}
        what = {"tooltip": f"{control.name}: {control.takes}"}
        self._down, self._up = (
            w.Button(description=sign, layout=w.Layout(**small), **what) for sign in ("−", "+")
        )
        self._text = w.HTML(layout=w.Layout(margin="0 0 0 8px"))
        self._down.on_click(lambda _: self._press(-1))
        self._up.on_click(lambda _: self._press(1))
        line = {"align_items": "center", "margin": "0"}
        self.box = w.HBox([self._down, self._up, self._text], layout=w.Layout(**line))

    def draw(self, shown: ControlView, effect: str, *, is_on: bool) -> None:
        self._num_draws += 1
        if shown.value == self._asked or self._num_draws > _PATIENCE_DRAWS:
            self._asked = None  # it came, or will not: then the notes say why
        self._value = shown.value
        self._down.disabled = self._up.disabled = not is_on
        self._show(effect)

    def _show(self, effect: str) -> None:
        now = text_of(self._value)
        asked = "" if self._asked is None else f" → {text_of(self._asked)} after the step"
        effect = f" ({effect})" if effect else ""
        name = f"<b>{escape(self._control.name)}</b>"
        self._text.value = f"{name} {escape(now + asked + effect)}"

    def _press(self, sign: int) -> None:
        # Of what was asked for and is not there yet: each press counts.
        value = moved(self._control, self._value if self._asked is None else self._asked, sign)
        if value is not None:
            self._asked, self._num_draws = value, 0
            self._show("")
            self._on_move(self._control.name, value)


def moved(control: LiveControl, value: Value, sign: int) -> Value | None:
    """Return the next value down (-1) or up (1); None: there is none.

    A number goes from one end of its range to the other in ten steps; without two ends it
    is halved or doubled.
    """
    if control.choices or isinstance(value, str | bool):
        values = control.choices or (False, True)
        at = values.index(value) + sign
        return values[at] if 0 <= at < len(values) else None
    if control.low is not None and control.high is not None:
        part = (control.high - control.low) / _PARTS
        new = value + sign * (max(1, round(part)) if control.kind == "int" else part)
    elif value == 0:
        new = sign * (float(control.default) or 1.0)
    else:
        new = value * 2.0 ** (sign if value > 0 else -sign)
        if control.kind == "int":
            new = value + sign if abs(new - value) < 1 else round(new)
    low = new if control.low is None else max(control.low, new)
    new = low if control.high is None else min(control.high, low)
    return None if new == value else control.checked(new)
