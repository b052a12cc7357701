"""Pause and Stop: what the two buttons say and do, apart from how they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit._text import OVER

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CANNOT_CLICK", "Controls"]

CANNOT_CLICK = "press ■ Interrupt to stop: this kernel serves no clicks while a cell runs"


class Controls:
    """Pause and Stop, and what they say between a click and its effect."""

    def __init__(
        self, on_stop: Callable[[], None], on_pause: Callable[[bool], None], *, can_click: bool
    ) -> None:
        self._on_stop, self._on_pause = on_stop, on_pause
        self._can_click = can_click
        self._state = "starting"
        self._clicked_in = ""
        self._is_stopping = False

    def build(self, w: Any) -> tuple[Any, Any]:  # Any: ipywidgets has no annotations
        """Return the two buttons."""
        layout = {"width": "104px", "flex": "0 0 auto", "margin": "0 0 0 8px"}
        self.pause = w.Button(icon="pause", layout=w.Layout(**layout))
        self.stop = w.Button(icon="stop", layout=w.Layout(**layout))
        self.pause.on_click(self._click_pause)
        self.stop.on_click(self._click_stop)
        return self.pause, self.stop

    def show(self, state: str) -> None:
        """Let the buttons fit the run's state."""
        self._state = state
        if self._clicked_in != state:
            self._clicked_in = ""
        is_stopping = self._is_stopping or state == "stopping"
        is_paused = state == "paused"
        waits = bool(self._clicked_in) or state == "pausing"
        verb = "Resum" if is_paused else "Paus"
        self.pause.description = f"{verb}ing…" if waits else f"{verb}e"
        self.pause.icon = "play" if is_paused else "pause"
        can_pause = state in ("running", "paused") and not waits and not is_stopping
        self._enable(self.pause, "hold all ranks after their step", is_enabled=can_pause)
        self.stop.description = "Stopping…" if is_stopping else "Stop"
        can_stop = not is_stopping and state not in OVER
        self._enable(self.stop, "end after the step; the model is kept", is_enabled=can_stop)

    def _enable(self, button: Any, tooltip: str, *, is_enabled: bool) -> None:
        button.disabled = not (is_enabled and self._can_click)
        button.tooltip = tooltip if self._can_click else CANNOT_CLICK

    def _click_pause(self, _: object) -> None:
        self._clicked_in = self._state
        self.show(self._state)
        self._on_pause(self._state != "paused")

    def _click_stop(self, _: object) -> None:
        self._is_stopping = True
        self.show(self._state)
        self._on_stop()
