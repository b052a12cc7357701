"""The dashboard's buttons: what they say and do, apart from where they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.events import OVER
from dtkit.views.words import MAX_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CANNOT_CLICK", "ORPHANED", "PANEL_CLASS", "Controls", "switch"]

CANNOT_CLICK = "press ■ Interrupt to stop: this kernel serves no clicks while a cell runs"

PANEL_CLASS = "dtkit-panel"
ORPHANED = f"""\
<style>
.dtkit-orphaned {{ display: none; line-height: 20px; padding: 0 8px;
  color: var(--jp-ui-font-color1, inherit); }}
.jupyter-widgets-disconnected .dtkit-orphaned {{ display: block; border-left: 4px solid #D55E00; }}
.{PANEL_CLASS} button.jupyter-widgets-disconnected,
.{PANEL_CLASS} .jupyter-widgets-disconnected .dtkit-sliders,
.{PANEL_CLASS}.jupyter-widgets-disconnected::before,
.{PANEL_CLASS} .jupyter-widgets-disconnected::before {{ display: none; }}
</style>
<div class="dtkit-orphaned">The kernel of this panel was restarted: it shows nothing new, and its
buttons are gone. The run goes on; <code>%dist_init --attach</code> in any cell shows it again, with
Stop.</div>"""
"""Seen when the front end says that the panel's kernel is gone: no code of ours runs then."""


class Controls:
    """Pause and Stop, which say what they wait for, and whether all ranks are shown.

    Args:
        on_stop: called when Stop is pressed.
        on_pause: called when Pause (True) or Resume (False) is pressed.
        on_switch: called when all ranks were switched on or off.
        can_click: tells whether clicks are served now: if not, every button is disabled.
    """

    def __init__(
        self,
        on_stop: Callable[[], None],
        on_pause: Callable[[bool], None],
        on_switch: Callable[[], None],
        *,
        can_click: Callable[[], bool],
    ) -> None:
        self._on_stop, self._on_pause, self._on_switch = on_stop, on_pause, on_switch
        self._can_click = can_click
        self._state = "starting"
        self._clicked_in = ""
        self._is_stopping = False
        self.has_all_ranks: bool = False

    def build(self, button: Any, layout: Any, num_ranks: int) -> None:
        """Make the buttons `pause`, `stop` and `all_ranks`.

        Args:
            button: ipywidgets' Button, Any because it has no annotations.
            layout: ipywidgets' Layout.
            num_ranks: how many ranks there are; of few, all are always shown.
        """
        wide = {"width": "108px", "flex": "0 0 auto", "margin": "0 0 0 8px"}
        small = {"width": "120px", "flex": "0 0 auto", "margin": "0 12px 0 0"}
        self.pause: Any = button(layout=layout(**wide))
        self.stop: Any = button(layout=layout(**wide))
        self.all_ranks: Any = button(layout=layout(**small))
        self._all = f"all {num_ranks} ranks"
        self.all_ranks.layout.display = None if num_ranks > MAX_ROWS else "none"
        self.pause.on_click(self._click_pause)
        self.stop.on_click(self._click_stop)
        self.all_ranks.on_click(self._click_all_ranks)

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
        self.pause.icon = "" if waits else "play" if is_paused else "pause"
        can_pause = state in ("running", "paused") and not waits and not is_stopping
        self._enable(self.pause, "hold all ranks after their step", is_enabled=can_pause)
        self.stop.description = "Stopping…" if is_stopping else "Stop"
        self.stop.icon = "" if is_stopping else "stop"
        can_stop = not is_stopping and state not in OVER
        self._enable(self.stop, "end after the step; the model is kept", is_enabled=can_stop)
        self.all_ranks.description = switch(self._all, is_on=self.has_all_ranks)
        self._enable(self.all_ranks, "show every rank", is_enabled=True)

    def _enable(self, button: Any, tooltip: str, *, is_enabled: bool) -> None:
        can_click = self._can_click()
        button.disabled = not (is_enabled and can_click)
        button.tooltip = tooltip if can_click else CANNOT_CLICK

    def _click_pause(self, _: object) -> None:
        # Asked for before it is shown: another thread may be drawing, and fail this one.
        self._on_pause(self._state != "paused")
        self._clicked_in = self._state
        self.show(self._state)

    def _click_stop(self, _: object) -> None:
        self._on_stop()
        self._is_stopping = True
        self.show(self._state)

    def _click_all_ranks(self, _: object) -> None:
        self.has_all_ranks = not self.has_all_ranks
        self.show(self._state)
        self._on_switch()


def switch(name: str, *, is_on: bool) -> str:
    """Return what a button says that switches something on and off."""
    return f"☑ {name}" if is_on else f"☐ {name}"
