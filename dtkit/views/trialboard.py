"""What is shown while a cell is tried again and again: the table so far, and a button to stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.display import display

from dtkit.views.controls import CANNOT_CLICK

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TrialBoard"]

_INTERVAL_S = 0.5


class TrialBoard:
    """A text that changes with a Stop button under it, and in the end a result in its place.

    Without a notebook only the result is shown.

    Args:
        on_stop: called when Stop is pressed; must only set flags.
        can_click: tells whether clicks are served while the cell runs.
    """

    def __init__(self, on_stop: Callable[[], None], *, can_click: Callable[[], bool]) -> None:
        self._on_stop = on_stop
        self._can_click = can_click
        self._is_notebook = getattr(get_ipython(), "kernel", None) is not None
        self._root: Any = None  # ipywidgets carries no types
        self._text: Any = None
        self._handle: Any = None
        self._is_stopping = False
        self._shown = ""
        self._next_s = 0.0

    def refresh(self, make: Callable[[], str]) -> None:
        """Show the HTML that `make` returns, twice a second at most."""
        if not self._is_notebook or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _INTERVAL_S
        html = make()
        if self._root is None:
            self._build()
            self._handle = display(self._root, display_id=True)
        self._show_button()
        if html != self._shown:
            self._shown = self._text.value = html

    def finish(self, result: Any) -> None:
        """Leave the result."""
        if self._handle is None:
            display(result)
        else:
            self._handle.update(result)
            self._root.children = ()

    def _build(self) -> None:
        import ipywidgets as w  # not needed where there is no front end

        self._text = w.HTML()
        self._stop = w.Button(description="Stop", icon="stop")
        self._stop.on_click(self._click)
        self._root = w.VBox([self._text, self._stop])

    def _show_button(self) -> None:
        can_click = self._can_click()
        self._stop.disabled = self._is_stopping or not can_click
        tooltip = "end after the step; what is done stays"
        self._stop.tooltip = tooltip if can_click else CANNOT_CLICK

    def _click(self, button: Any) -> None:
        self._is_stopping, button.description = True, "Stopping…"
        self._show_button()
        self._on_stop()
