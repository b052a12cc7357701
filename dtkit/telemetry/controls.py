"""The live controls of a run: which there are, what they are now, and when that was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import ControlDeclared, ControlsChanged
from dtkit.livecontrol import LR_FACTOR, LiveControl
from dtkit.telemetry.view import ControlChange, ControlView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["ControlsState"]


class ControlsState:
    """Takes what the ranks say of live controls; each says the same."""

    def __init__(self) -> None:
        self.declared: dict[str, LiveControl] = {LR_FACTOR.name: LR_FACTOR}
        self._changes: dict[int, ControlsChanged] = {}

    def take(self, event: ControlDeclared | ControlsChanged) -> None:
        """Take an event in."""
        if isinstance(event, ControlsChanged):
            self._changes.setdefault(event.change, event)
        elif event.name not in self.declared:
            rules = (event.default, event.low, event.high, tuple(event.choices))
            # A new value, not an entry: somebody may be going through the old one.
            self.declared = {**self.declared, event.name: LiveControl(event.name, *rules)}

    def views(self) -> tuple[ControlView, ...]:
        """Return every control with its present value."""
        values = {name: control.default for name, control in self.declared.items()}
        for change in self._changes.values():
            values |= change.values
        return tuple(ControlView(c, values[name]) for name, c in self.declared.items())

    def changes(self, step_at: Callable[[float], int] | None) -> tuple[ControlChange, ...]:
        """Return what was changed, in order.

        Args:
            step_at: returns the row at a time, where the ranks' own steps say nothing of it.
        """
        return tuple(
            ControlChange(step_at(c.time_s) if step_at else c.step, c.time_s, dict(c.values))
            for c in self._changes.values()
        )

    def columns(self, steps: Floats, changes: Iterable[ControlChange]) -> dict[str, Floats]:
        """Return what each number among them was in each step; the factor, if it was changed.

        Args:
            steps: (num_steps,) float64.
            changes: as `changes` returns them.
        """
        found = {
            name: np.full(len(steps), float(control.default))
            for name, control in self.declared.items()
            if not isinstance(control.default, str)
        }
        for change in changes:
            for name, value in change.values.items():
                if name in found and not isinstance(value, str):
                    found[name][steps > change.step] = float(value)
        if not any(LR_FACTOR.name in change.values for change in self._changes.values()):
            del found[LR_FACTOR.name]
        return found
