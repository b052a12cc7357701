"""The live picture of a run under its cell: which kind of it fits where the code runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from IPython.core.getipython import get_ipython
from IPython.display import display

from dtkit.errors import InvalidInputError
from dtkit.views.live import can_live
from dtkit.views.pace import Budget, Pace
from dtkit.views.panel import WidgetDashboard, show_summary
from dtkit.views.summary import card, summary_bundle
from dtkit.views.terminal import NullDashboard, TextDashboard
from dtkit.views.words import text_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from IPython.display import DisplayHandle

    from dtkit.livecontrol import Value
    from dtkit.output import OutputBlock
    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView

    Blocks = tuple[OutputBlock, ...]

__all__ = [
    "Dashboard",
    "HtmlDashboard",
    "NullDashboard",
    "TextDashboard",
    "WidgetDashboard",
    "make_dashboard",
]

_HTML_INTERVAL_S = 1.0


class Dashboard(Protocol):
    """What shows a run while it goes on."""

    def start(self, view: RunView) -> None:
        """Show the run under the cell that is running."""

    def is_due(self) -> bool:
        """Return whether `update` would draw: if not, no view need be made."""

    def update(self, view: RunView, blocks: Blocks) -> None:
        """Show the run as it is now; does nothing while it is not due."""

    def finish(self, view: RunView, blocks: Blocks) -> None:
        """Replace what was shown by the static summary; only the first call counts."""


def make_dashboard(
    *,
    on_stop: Callable[[], None],
    on_pause: Callable[[bool], None],
    on_control: Callable[[str, Value], None] = lambda _name, _value: None,
    curves: Callable[[], Mapping[str, Curve]] = dict,
    ui: str = "auto",
    can_click: Callable[[], bool] | None = lambda: True,
) -> Dashboard:
    """Return the dashboard that fits where the code runs.

    Args:
        on_stop: called when Stop is pressed, on the main thread or another; must only set flags.
        on_pause: the same for Pause (True) and Resume (False).
        on_control: called with a live control's name and its new value; must only set flags.
        curves: returns all that can be drawn of the run.
        ui: auto, live, widgets, html, text or off. auto asks the environment variable
            DTKIT_UI, then takes live (charts in the browser) in a notebook if anywidget is
            installed, widgets (charts as pictures) if it is not, and text elsewhere.
        can_click: tells whether the kernel serves clicks now, while the cell runs, which may depend
            on the front end; None: it never does.

    Raises:
        InvalidInputError: there is no such `ui`.
    """
    kind = os.environ.get("DTKIT_UI", "auto") if ui == "auto" else ui
    if kind == "auto":
        is_notebook = getattr(get_ipython(), "kernel", None) is not None
        can_draw = can_click is not None and can_live()
        kind = ("live" if can_draw else "widgets") if is_notebook else "text"
    if kind == "live" and not can_live():
        msg = "ui 'live' needs the package anywidget: pip install 'dtkit[live]'"
        raise InvalidInputError(msg)
    if kind in ("live", "widgets"):
        return WidgetDashboard(
            on_stop=on_stop,
            on_pause=on_pause,
            on_control=on_control,
            curves=curves,
            is_live=kind == "live",
            can_click=can_click or (lambda: False),
        )
    simple: dict[str, Callable[[], Dashboard]]
    simple = {
        "html": lambda: HtmlDashboard(curves=curves),
        "text": TextDashboard,
        "off": NullDashboard,
    }
    if kind not in simple:
        valid = ", ".join(["auto", "live", "widgets", *simple])
        msg = f"ui {kind!r} does not exist; choose one of {valid} (also as DTKIT_UI)"
        raise InvalidInputError(msg)
    return simple[kind]()


class HtmlDashboard:
    """The card itself, displayed anew once a second: for front ends without widgets."""

    def __init__(
        self, budget: Budget | None = None, *, curves: Callable[[], Mapping[str, Curve]] = dict
    ) -> None:
        self._curves = curves
        self._pace = Pace(_HTML_INTERVAL_S, budget or Budget())
        self._chart: Any = None
        self._handle: DisplayHandle | None = None
        self._is_over = False

    def start(self, view: RunView) -> None:
        """Display the card without numbers."""
        from dtkit.views.chart import Chart  # matplotlib takes half a second

        self._chart = Chart()
        self._handle = display(self._bundle(view, ()), raw=True, display_id=True)

    def is_due(self) -> bool:
        """Return whether the card may be drawn again."""
        return self._handle is not None and not self._is_over and self._pace.is_due()

    def update(self, view: RunView, blocks: Blocks) -> None:
        """Draw the card again."""
        handle = self._handle
        if handle is not None and self.is_due():
            self._pace.run(lambda: handle.update(self._bundle(view, blocks), raw=True))

    def finish(self, view: RunView, blocks: Blocks) -> None:
        """Replace the card by the summary."""
        if not self._is_over:
            self._is_over = True
            show_summary(self._handle, summary_bundle(view, blocks, self._curves()))

    def _bundle(self, view: RunView, blocks: Blocks) -> dict[str, object]:
        html = card(view, blocks, self._chart.render(view))
        return {"text/html": html, "text/plain": text_line(view)}
