"""Live controls in the browser: sliders, boxes and lists whose messages are served like clicks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.livecontrol import LR_FACTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.livecontrol import Value
    from dtkit.telemetry.view import RunView

__all__ = ["LiveSliders"]

_HERE = Path(__file__).parent


class LiveSliders:
    """One row for each control; a value is told when the slider is let go.

    Args:
        on_move: called with a control's name and its new value.
    """

    def __init__(self, on_move: Callable[[str, Value], None]) -> None:
        self._on_move = on_move
        self._widget: Any = None  # anywidget is there or not

    def build(self) -> Any:
        """Return the widget to be displayed."""
        self._widget = _widget_class()()
        self._widget.on_msg(self._hear)
        return self._widget

    def close(self) -> None:
        """Take it away."""
        self._widget.close()

    def draw(self, view: RunView, *, is_on: bool) -> None:
        """Show the controls as they are now."""
        rows = [
            {
                "name": found.control.name,
                "kind": found.control.kind,
                "value": found.value,
                "default": found.control.default,
                "low": found.control.low,
                "high": found.control.high,
                "choices": list(found.control.choices),
                "takes": found.control.takes,
            }
            for found in view.controls
        ]
        lr = f"lr {view.lr:.3g}" if view.step else ""
        with self._widget.hold_sync():  # what is as it was is not sent
            self._widget.rows, self._widget.is_on = rows, is_on
            self._widget.effects = {LR_FACTOR.name: lr}

    def _hear(self, _widget: object, content: object, _buffers: object) -> None:
        if isinstance(content, dict) and {"name", "value"} <= content.keys():
            self._on_move(content["name"], content["value"])


def _widget_class() -> Any:
    from anywidget import AnyWidget
    from traitlets import Bool, Dict, List

    class Sliders(AnyWidget):
        _esm = (_HERE / "keys.js").read_text() + (_HERE / "sliders.js").read_text()
        _css = (_HERE / "sliders.css").read_text()
        rows: Any = List().tag(sync=True)
        effects: Any = Dict().tag(sync=True)
        is_on = Bool(default_value=True).tag(sync=True)

    return Sliders
