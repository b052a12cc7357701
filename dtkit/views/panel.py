"""The panel under a running cell, of widgets, and the static summary that replaces it.

Buttons only call back; whoever made the panel sets flags there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.display import display

from dtkit.views import render
from dtkit.views.controls import ORPHANED, PANEL_CLASS, Controls
from dtkit.views.live import LiveChart
from dtkit.views.pace import Budget, Pace
from dtkit.views.picture import PictureChart
from dtkit.views.steering import Steering
from dtkit.views.summary import ranks_panel, summary_bundle
from dtkit.views.words import MAX_ROWS, slow_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from IPython.display import DisplayHandle

    from dtkit.livecontrol import Value
    from dtkit.output import OutputBlock
    from dtkit.telemetry import Curve
    from dtkit.telemetry.view import RunView

    Blocks = tuple[OutputBlock, ...]

__all__ = ["WidgetDashboard", "show_summary"]

_TEXT_INTERVAL_S = 0.25
_CHART_INTERVAL_S = 0.5
_MUST_DRAW_WITHIN_S = 6.0
"""After this a picture takes the place of charts that no browser has drawn: the front end may lack
what they take, and the kernel cannot see what it shows instead."""
_MAX_LOG_CHARS = 12_000
_ROW_PX = 22


class WidgetDashboard:
    """Widgets under the cell: state and buttons, numbers, chart, and tabs that hold still.

    Every part has a fixed height, so nothing moves while it is updated. All
    that is clicked is a Button: while a cell runs, JupyterLab sends only the
    first change of any other widget's value (it waits for the kernel to be
    idle), but every click of a button.

    Args:
        on_stop: as in `make_dashboard`.
        on_pause: as in `make_dashboard`.
        on_control: as in `make_dashboard`.
        curves: as in `make_dashboard`.
        is_live: whether the browser draws the charts, and the kernel no picture.
        can_click: as in `make_dashboard`.
        budget: what part of a core it may take.
    """

    def __init__(
        self,
        *,
        on_stop: Callable[[], None],
        on_pause: Callable[[bool], None],
        on_control: Callable[[str, Value], None] = lambda _name, _value: None,
        curves: Callable[[], Mapping[str, Curve]] = dict,
        is_live: bool = False,
        can_click: Callable[[], bool] = lambda: True,
        budget: Budget | None = None,
    ) -> None:
        self._budget = budget or Budget()
        # Apart, so that a slow chart does not hold up the state.
        self._pace = Pace(_TEXT_INTERVAL_S, self._budget, 0.25)
        self._slow_pace = Pace(_CHART_INTERVAL_S, self._budget, 0.75)
        self._controls = Controls(on_stop, on_pause, self._slow_pace.hurry, can_click=can_click)
        self._live = LiveChart(curves) if is_live else None
        self._steering = Steering(on_control, can_click=can_click)
        self._curves, self._can_click = curves, can_click
        self._picture: PictureChart | None = None
        self._begun_s = self._budget.clock()
        self._handle: DisplayHandle | None = None
        self._root: Any = None
        self._is_over = False

    def start(self, view: RunView) -> None:
        """Display the widgets, with an empty chart so that nothing moves when it fills."""
        self._begun_s = self._budget.clock()
        self._build(view)
        self._draw_text(view)
        self._draw_rest(view, ())
        self._handle = display(self._root, display_id=True)
        self._budget.begin()

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
            has_log_scale = self._picture is not None and self._picture.look.log_scale
            bundle = summary_bundle(view, blocks, self._curves(), log_scale=has_log_scale)
            show_summary(self._handle, bundle)
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
        self._charts = w.VBox(layout=w.Layout(width="100%", margin="0"))
        if self._live is None:
            self._show_picture()
        else:
            self._charts.children = (self._live.build(),)
        self._ranks, self._notes = w.HTML(), w.HTML()
        # A reversed column stays scrolled to its end while text is added to it; the
        # margin keeps a short text at its top.
        self._logs = w.HTML(layout=w.Layout(margin="0 0 auto 0", flex="0 0 auto"))
        self._tabs = w.Tab([
            w.VBox([controls.all_ranks, self._ranks], layout=w.Layout(**pane)),
            w.VBox([self._logs], layout=w.Layout(**pane, flex_flow="column-reverse")),
            w.VBox([self._notes], layout=w.Layout(**pane)),
            w.VBox([self._steering.build(is_live=self._live is not None)], layout=w.Layout(**pane)),
        ], layout=w.Layout(width="100%", margin="0"))  # fmt: skip
        first = w.HBox([self._state, controls.pause, controls.stop], layout=w.Layout(**line))
        orphaned = w.HTML(ORPHANED, layout=w.Layout(margin="0", height="auto"))
        self._root = w.VBox(
            [orphaned, first, self._tiles, self._metrics, self._charts, self._tabs],
            layout=w.Layout(width="740px", max_width="100%"),
        )
        self._root.add_class(PANEL_CLASS)

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
            f"Notes ({len(view.remarks)})" if view.remarks else "Notes",
            "Controls",
        )
        self._steering.draw(view)
        self._ranks.value = ranks_panel(view, is_full=self._controls.has_all_ranks)
        self._notes.value = render.notes_list(view)
        self._logs.value = render.log_blocks(
            blocks, len(view.ranks), max_chars=_MAX_LOG_CHARS, is_live=True
        )
        self._draw_chart(view)

    def _draw_chart(self, view: RunView) -> None:
        if self._live is not None:
            self._live.draw(view)
            if (
                not self._live.is_drawn
                and self._budget.clock() - self._begun_s > _MUST_DRAW_WITHIN_S
            ):
                self._live = None
                self._steering.use_buttons()
                self._show_picture()
        if self._picture is not None:
            self._picture.draw(view)

    def _show_picture(self) -> None:
        before = self._charts.children
        self._picture = PictureChart(self._curves, self._slow_pace.hurry, can_click=self._can_click)
        self._charts.children = (self._picture.build(),)
        for part in before:
            _close(part)


def _close(widget: Any) -> None:
    """Close a widget with its parts; ipywidgets leaves layouts, styles and children open."""
    from ipywidgets import Widget

    for value in widget.trait_values(sync=True).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Widget):
                _close(part)
    widget.close()


def show_summary(handle: DisplayHandle | None, bundle: dict[str, object]) -> None:
    """Put a summary in the place of what was displayed; display it if nothing was."""
    if handle is None:
        display(bundle, raw=True)
    else:
        handle.update(bundle, raw=True)
