"""Stopping and pausing a run at a step boundary, all ranks at the same one.

Ranks are never interrupted in the middle of a step for this: one would leave
while others wait for it in a collective. The driver does it in two moves.

1. `hold`: each rank answers with the index of the next boundary that it has
   not passed, and halts there.
2. `release` until the largest of these: ranks that halted earlier run on to it.
   There they stop or stay paused, as asked.

A boundary is where a step has been finished and the next begins: the next batch
is asked for, a backward pass starts, or a step that computes its own loss.
Neither the end of `step()` nor the zeroing of gradients after it: the cell's own
`scheduler.step()` and `scaler.update()` still belong to the step.
"""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Control", "RunStopped"]

_POLL_S = 0.2


class RunStopped(BaseException):
    """Ends the cell at a step boundary because the user asked to stop.

    A BaseException, like KeyboardInterrupt, so that a cell's own
    `except Exception` does not swallow it.
    """


class Control:
    """Where this rank is and whether it may go on. One thread runs, another decides."""

    def __init__(self) -> None:
        self.num_steps: int = 0
        self._num_passed = 0
        self._is_asked = False
        self._until = 0
        self._action = "run"
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
            self._halt()
        self._num_passed = self.num_steps
        return True

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take a request of the driver; returns where this rank is."""
        with self._changed:
            operation = request["operation"]
            if operation == "hold":
                self._is_asked, self._until, self._action = True, 0, "wait"
            elif operation == "release":
                self._until = int(request["until"])
                self._action = request["action"]
            elif operation == "resume":
                self._is_asked, self._action = False, "run"
            self._changed.notify_all()
            return {
                "step": self.num_steps,
                "next_boundary": self._num_passed + 1,
                "held": self._is_held,
            }

    def _halt(self) -> None:
        __tracebackhide__ = True
        with self._changed:
            self._is_held = True
            try:
                while self._is_asked and not self._may_pass():
                    if self._is_at_end() and self._action == "stop":
                        raise RunStopped
                    # Not for ever at once: a signal is served only in between.
                    self._changed.wait(_POLL_S)
            finally:
                self._is_held = False

    def _is_at_end(self) -> bool:
        return self._action != "wait" and self.num_steps >= self._until

    def _may_pass(self) -> bool:
        return self._action != "wait" and self.num_steps < self._until
