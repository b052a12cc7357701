"""Requests: what the user asks of a cell while it runs."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from dtkit.alarm import Alarm

if TYPE_CHECKING:
    from dtkit.livecontrol import Value

__all__ = ["Requests"]

_RESTART_S = 0.2
"""How long a restart may come after the Interrupt that Jupyter sends before it."""


class Requests:
    """What the user asked of a run since the driver last looked. Set from any thread."""

    def __init__(self) -> None:
        self.is_now: bool = False
        self.is_pause: bool = False
        self.num_interrupts: int = 0
        self.changes: deque[dict[str, Value]] = deque()
        """New values of live controls, checked already."""
        self._is_pressed = False
        self._interrupted_s = 0.0
        self.outcome = ""
        """What was done to the ranks in the end, for the user to read."""
        self.alarm: Alarm = Alarm()
        """Rings when there is something to see to: whoever waits for the cell looks at once."""
        self.is_background = False
        """Whether no cell waits for it, so that it goes on when the kernel ends."""
        self.is_left = False
        """Whether this kernel has let go of it, and it goes on."""

    @property
    def is_stop(self) -> bool:
        """Whether a stop was asked for."""
        return self._is_pressed or self.num_interrupts > 0

    def stop(self) -> None:
        """Ask for a stop after the step."""
        self._is_pressed = True
        self.alarm.ring()

    def stop_now(self) -> None:
        """Ask for a stop here and now, in the middle of a step if need be."""
        self.is_now = True
        self.stop()

    def pause(self, is_paused: bool) -> None:  # noqa: FBT001  a callback's signature
        """Ask for a pause after the step, or for its end."""
        self.is_pause = is_paused
        self.alarm.ring()

    def change(self, values: dict[str, Value]) -> None:
        """Ask for new values of live controls, all from the same step on."""
        self.changes.append(values)
        self.alarm.ring()

    def interrupt(self) -> None:
        """Note a press of the notebook's Interrupt; the first one asks for a stop."""
        self.num_interrupts += 1
        self._interrupted_s = time.monotonic()

    def may_be_restart(self) -> bool:
        """Whether all that was asked may be the beginning of a restart of the kernel.

        Jupyter interrupts a kernel before it restarts it, and a run goes on through that.
        """
        waited_s = time.monotonic() - self._interrupted_s
        return not self._is_pressed and self.num_interrupts == 1 and waited_s < _RESTART_S
