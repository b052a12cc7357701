"""What is shown while a cell is tried again and again: the table so far, and a button to stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.display import display

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TrialBoard"]

_INTERVAL_S = 0.5


class TrialBoard:
    """A text that changes with a Stop button under it, and in the end a result in its place.

    Without a notebook only the result is shown.

    Args:
        on_stop: called when Stop is pressed; must only set flags.
        can_click: whether clicks are served while the cell runs.
    """

    def __init__(self, on_stop: Callable[[], None], *, can_click: bool) -> None:
        self._on_stop = on_stop
        self._can_click = can_click
        self._is_notebook = getattr(get_ipython(), "kernel", None) is not None
        self._root: Any = None  # ipywidgets carries no types
        self._text: Any = None
        self._handle: Any = None
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
        stop = w.Button(description="Stop", icon="stop", disabled=not self._can_click)
        stop.tooltip = "end after the step; what is done stays" if self._can_click else (
            "press ■ Interrupt to stop: this kernel serves no clicks while a cell runs"
        )  # fmt: skip
        stop.on_click(self._click)
        self._root = w.VBox([self._text, stop])

    def _click(self, button: Any) -> None:
        button.disabled, button.description = True, "Stopping…"
        self._on_stop()
