"""Stopping, pausing and changing a run at a step boundary, all ranks at the same one.

Ranks are never interrupted in the middle of a step for this: one would leave
while others wait for it in a collective. The driver does it in two moves.

1. `hold`: each rank answers with the index of the next boundary that it has
   not passed, and halts there.
2. `release` until the largest of these: ranks that halted earlier run on to it.
   There they stop, stay paused, or take new values of live controls and run on, as asked.

A boundary is where a step has been finished and the next begins: the next batch
is asked for, a backward pass starts, or a step that computes its own loss.
Neither the end of `step()` nor the zeroing of gradients after it: the cell's own
`scheduler.step()` and `scaler.update()` still belong to the step.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Control", "RunStopped"]

_POLL_S = 0.2


class RunStopped(BaseException):
    """Ends the cell at a step boundary because the user asked to stop.

    A BaseException, like KeyboardInterrupt, so that a cell's own
    `except Exception` does not swallow it.
    """


class Control:
    """Where this rank is and whether it may go on. One thread runs, another decides.

    Args:
        on_change: called on the training thread, at a boundary, with the number of a change of
            live controls and their new values.
    """

    def __init__(self, on_change: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        self.num_steps: int = 0
        self._on_change = on_change
        self._num_passed = 0
        self._is_asked = False
        self._until = 0
        self._action = "run"
        self._changes: deque[dict[str, Any]] = deque()
        self._is_held = False
        self._changed = threading.Condition()

    def stepped(self) -> None:
        """Note a finished step."""
        self.num_steps += 1

    def boundary(self) -> bool:
        """Pass the boundary after the last step, or halt there if that was asked for.

        Returns:
            Whether there was one: False if no step was made since the last.

        Raises:
            RunStopped: the run is to end here.
        """
        if self.num_steps == self._num_passed:
            return False
        if self._is_asked:
            __tracebackhide__ = True
            self._attend()
        # No call between the test and this: what `hold` answers in between would be wrong.
        self._num_passed = self.num_steps
        return True

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take a request of the driver; returns where this rank is."""
        with self._changed:
            operation = request["operation"]
            if operation == "hold":
                self._is_asked, self._until, self._action = True, 0, "wait"
            elif operation == "release":
                self._is_asked = True
                self._until, self._action = int(request["until"]), request["action"]
                if request.get("change"):
                    self._changes.append({"at": self._until, **request["change"]})
            elif operation == "resume":
                self._action = "run"
            self._changed.notify_all()
            return {
                "step": self.num_steps,
                "next_boundary": self._num_passed + 1,
                "held": self._is_held,
            }

    def _attend(self) -> None:
        __tracebackhide__ = True
        with self._changed:
            self._is_held = True
            try:
                self._make_changes()
                while not self._may_pass():
                    if self._action == "stop" and self.num_steps >= self._until:
                        raise RunStopped
                    # Not for ever at once: a signal is served only in between.
                    self._changed.wait(_POLL_S)
                    self._make_changes()
            finally:
                self._is_held = False
            self._is_asked = self._action != "run" or bool(self._changes)
            self._num_passed = self.num_steps

    def _may_pass(self) -> bool:
        is_short_of_it = self._action != "wait" and self.num_steps < self._until
        return self._action == "run" or is_short_of_it

    def _make_changes(self) -> None:
        """Make those that are due: of a rank that waits here, too."""
        while self._changes and self._changes[0]["at"] <= self.num_steps:
            change = self._changes.popleft()
            if self._on_change is not None:
                self._on_change(change["number"], change["values"])
