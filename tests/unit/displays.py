"""What dashboards show, and when, as tests look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets
from IPython.utils.capture import RichOutput

from dtkit.output import OutputBlock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from IPython.utils.capture import CapturedIO

    from dtkit.views.panel import WidgetDashboard

WIDGET = "application/vnd.jupyter.widget-view+json"
BLOCKS = (OutputBlock((0, 1, 2, 3), "epoch <1>\n"),)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


def no_cost() -> float:
    return 0.0


class Displayed(Sequence[RichOutput]):
    """What was displayed so far, in order; replacements have `update`."""

    def __init__(self, captured: CapturedIO) -> None:
        self._captured = captured

    def __getitem__(self, index: Any) -> Any:
        return self._captured.outputs[index]

    def __len__(self) -> int:
        return len(self._captured.outputs)


def widgets_of(root: Any) -> Iterator[Any]:
    yield root
    for child in getattr(root, "children", ()):
        yield from widgets_of(child)


def find(dashboard: WidgetDashboard, kind: type) -> list[Any]:
    return [widget for widget in widgets_of(dashboard._root) if isinstance(widget, kind)]


def button(dashboard: WidgetDashboard, name: str) -> Any:
    return next(b for b in find(dashboard, ipywidgets.Button) if name in b.description)


def html_of(dashboard: WidgetDashboard) -> str:
    return "".join(widget.value for widget in find(dashboard, ipywidgets.HTML))


def image(dashboard: WidgetDashboard) -> bytes:
    (widget,) = find(dashboard, ipywidgets.Image)
    return bytes(widget.value)
