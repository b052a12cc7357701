"""The live picture of a run under its cell, and the static summary that replaces it.

The only module that knows ipywidgets, and it imports it with the first widget.
Buttons only call back; whoever made the dashboard sets flags there.
"""

from __future__ import annotations

import os
import time
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from IPython.core.getipython import get_ipython
from IPython.display import display

from dtkit._text import MAX_ROWS, OVER, slow_ranks, text_line
from dtkit.errors import InvalidInputError
from dtkit.views import render
from dtkit.views.controls import Controls
from dtkit.views.summary import card, ranks_panel, summary_bundle
from dtkit.views.terminal import NullDashboard, Pace, TextDashboard

if TYPE_CHECKING:
    from collections.abc import Callable

    from IPython.display import DisplayHandle

    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RunView

    Blocks = tuple[OutputBlock, ...]
    Clock = Callable[[], float]

__all__ = [
    "Dashboard",
    "HtmlDashboard",
    "NullDashboard",
    "TextDashboard",
    "WidgetDashboard",
    "make_dashboard",
]

_TEXT_INTERVAL_S = 0.25
_CHART_INTERVAL_S = 0.5
_HTML_INTERVAL_S = 1.0
_MAX_LOG_CHARS = 12_000
_ROW_PX = 22


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
    ui: str = "auto",
    can_click: bool = True,
) -> Dashboard:
    """Return the dashboard that fits where the code runs.

    Args:
        on_stop: called when Stop is pressed, on the main thread or another; must only set flags.
        on_pause: the same for Pause (True) and Resume (False).
        ui: auto, widgets, html, text or off. auto asks the environment variable
            DTKIT_UI, then takes widgets in a notebook and text elsewhere.
        can_click: False when the kernel serves no clicks while the cell runs.

    Raises:
        InvalidInputError: there is no such `ui`.
    """
    kind = os.environ.get("DTKIT_UI", "auto") if ui == "auto" else ui
    if kind == "auto":
        is_notebook = getattr(get_ipython(), "kernel", None) is not None
        kind = "widgets" if is_notebook else "text"
    if kind == "widgets":
        return WidgetDashboard(on_stop=on_stop, on_pause=on_pause, can_click=can_click)
    simple: dict[str, Callable[[], Dashboard]]
    simple = {"html": HtmlDashboard, "text": TextDashboard, "off": NullDashboard}
    if kind not in simple:
        valid = ", ".join(["auto", "widgets", *simple])
        msg = f"ui {kind!r} does not exist; choose one of {valid} (also as DTKIT_UI)"
        raise InvalidInputError(msg)
    return simple[kind]()


class HtmlDashboard:
    """The card itself, displayed anew once a second: for front ends without widgets."""

    def __init__(self, clock: Clock = time.monotonic, cpu_clock: Clock = time.thread_time) -> None:
        self._pace = Pace(_HTML_INTERVAL_S, clock, cpu_clock)
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
            _show_summary(self._handle, summary_bundle(view, blocks))

    def _bundle(self, view: RunView, blocks: Blocks) -> dict[str, object]:
        html = card(view, blocks, self._chart.render(view))
        return {"text/html": html, "text/plain": text_line(view)}


class WidgetDashboard:
    """Widgets under the cell: state and buttons, numbers, chart, and tabs that hold still.

    Every part has a fixed height, so nothing moves while it is updated. All
    that is clicked is a Button: while a cell runs, JupyterLab sends only the
    first change of any other widget's value (it waits for the kernel to be
    idle), but every click of a button.

    Args:
        on_stop: as in `make_dashboard`.
        on_pause: as in `make_dashboard`.
        can_click: as in `make_dashboard`.
        clock: seconds that pass.
        cpu_clock: seconds that this thread computed.
    """

    def __init__(
        self,
        *,
        on_stop: Callable[[], None],
        on_pause: Callable[[bool], None],
        can_click: bool = True,
        clock: Clock = time.monotonic,
        cpu_clock: Clock = time.thread_time,
    ) -> None:
        # Together 4 % of a core; apart, so that a slow chart does not hold up the state.
        self._pace = Pace(_TEXT_INTERVAL_S, clock, cpu_clock, 0.01)
        self._slow_pace = Pace(_CHART_INTERVAL_S, clock, cpu_clock, 0.03)
        self._controls = Controls(on_stop, on_pause, self._slow_pace.hurry, can_click=can_click)
        self._chart: Any = None
        self._drawn: tuple[object, ...] = ()
        self._handle: DisplayHandle | None = None
        self._root: Any = None
        self._is_over = False

    def start(self, view: RunView) -> None:
        """Display the widgets, with an empty chart so that nothing moves when it fills."""
        from dtkit.views.chart import Chart  # matplotlib takes half a second

        self._chart = Chart()
        self._build(view)
        self._draw_text(view)
        self._draw_rest(view, ())
        self._handle = display(self._root, display_id=True)

    def is_due(self) -> bool:
        """Return whether something may be drawn again."""
        is_open = self._root is not None and not self._is_over
        return is_open and (self._pace.is_due() or self._slow_pace.is_due())

    def update(self, view: RunView, blocks: Blocks) -> None:
        """Draw what changed."""
        if not self.is_due():
            return
        if self._pace.is_due():
            self._pace.run(lambda: self._draw_text(view))
        if self._slow_pace.is_due():
            self._slow_pace.run(lambda: self._draw_rest(view, blocks))

    def finish(self, view: RunView, blocks: Blocks) -> None:
        """Replace the widgets by the summary, and close them but for a box that shows it too.

        A page that was reloaded during the run has lost the cell's output, which
        cannot be replaced there, and sees the run through the widgets alone.
        """
        if self._is_over:
            return
        self._is_over = True
        bundle: dict[str, object] = {}
        try:
            bundle = summary_bundle(view, blocks, log_scale=self._controls.has_log_scale)
            _show_summary(self._handle, bundle)
        finally:
            if self._root is not None:
                self._keep_only(str(bundle.get("text/html", "")))

    def _keep_only(self, html: str) -> None:
        import ipywidgets as w

        parts, self._root.children = self._root.children, (w.HTML(html),)
        for part in parts:
            _close(part)

    def _build(self, view: RunView) -> None:
        import ipywidgets as w  # not needed where there is no front end

        controls = self._controls
        controls.build(w.Button, w.Layout, len(view.ranks))
        num_rows = len(view.ranks) if len(view.ranks) <= MAX_ROWS else 5
        height_px = max(120, _ROW_PX * (num_rows + 1) + 16)
        pane = {"height": f"{height_px}px", "overflow": "auto", "width": "100%"}
        grow = {"flex": "1 1 auto", "min_width": "0", "width": "auto", "margin": "0"}
        line = {"width": "100%", "margin": "0", "align_items": "center"}
        self._state = w.HTML(layout=w.Layout(**grow))
        self._tiles = w.HTML(layout=w.Layout(width="100%", margin="8px 0 4px 0"))
        self._metrics = w.HTML(layout=w.Layout(**grow))
        self._image = w.Image(layout=w.Layout(width="740px", height="240px", margin="4px 0"))
        # An Image has no alt, and a tooltip breaks it (ipywidgets 8.1): the words stand beside it.
        self._alt = w.HTML(layout=w.Layout(height="0", margin="0"))
        self._ranks, self._notes = w.HTML(), w.HTML()
        # A reversed column stays scrolled to its end while text is added to it; the
        # margin keeps a short text at its top.
        self._logs = w.HTML(layout=w.Layout(margin="0 0 auto 0", flex="0 0 auto"))
        self._tabs = w.Tab([
            w.VBox([controls.all_ranks, self._ranks], layout=w.Layout(**pane)),
            w.VBox([self._logs], layout=w.Layout(**pane, flex_flow="column-reverse")),
            w.VBox([self._notes], layout=w.Layout(**pane)),
        ], layout=w.Layout(width="100%", margin="0"))  # fmt: skip
        first = w.HBox([self._state, controls.pause, controls.stop], layout=w.Layout(**line))
        second = w.HBox([controls.log_scale, self._metrics], layout=w.Layout(**line))
        self._root = w.VBox(
            [first, self._tiles, second, self._image, self._alt, self._tabs],
            layout=w.Layout(width="740px", max_width="100%"),
        )

    def _draw_text(self, view: RunView) -> None:
        self._controls.show(view.state)
        self._state.value = render.state_line(view)
        self._tiles.value = render.tiles(view)
        self._metrics.value = render.metrics_line(view)

    def _draw_rest(self, view: RunView, blocks: Blocks) -> None:
        slow = slow_ranks(view)
        self._tabs.titles = (
            f"Ranks ▲ {len(slow)} slow" if slow else f"Ranks ({len(view.ranks)})",
            f"Logs ({len(blocks)})" if blocks else "Logs",
            f"Notes ({len(view.notes)})" if view.notes else "Notes",
        )
        self._ranks.value = ranks_panel(view, is_full=self._controls.has_all_ranks)
        self._notes.value = render.notes_list(view)
        self._logs.value = render.log_blocks(
            blocks, len(view.ranks), max_chars=_MAX_LOG_CHARS, is_live=True
        )
        self._draw_chart(view)

    def _draw_chart(self, view: RunView) -> None:
        from dtkit.views.chart import alt_text

        log_scale = self._controls.has_log_scale
        drawn = (view.step, view.state in OVER, log_scale)
        if drawn != self._drawn:
            self._drawn = drawn
            self._image.value = self._chart.render(view, log_scale=log_scale)
            self._alt.value = f'<div role="img" aria-label="{escape(alt_text(view))}"></div>'


def _close(widget: Any) -> None:
    """Close a widget with its parts; ipywidgets leaves layouts, styles and children open."""
    from ipywidgets import Widget

    for value in widget.trait_values(sync=True).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Widget):
                _close(part)
    widget.close()


def _show_summary(handle: DisplayHandle | None, bundle: dict[str, object]) -> None:
    if handle is None:
        display(bundle, raw=True)
    else:
        handle.update(bundle, raw=True)
