"""A loss that is not finite: said at once, and the run ended there if that was asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dtkit.engine.parts import Part

if TYPE_CHECKING:
    import torch

    from dtkit.engine.run import ActiveRun

__all__ = ["NonFiniteLossError", "make"]


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite, and the run was to stop then."""


class NanGuard(Part):
    """Looks at every loss before it is backpropagated.

    A loss on a GPU is looked at one pass later, when the device has long
    computed it: looking at once would wait for the device in every step. If the run
    is to end it does wait: a pass later the average has ruined all ranks' weights.

    Args:
        run: the run.
        is_fatal: whether the run ends; else a note is made, once.
    """

    def __init__(self, run: ActiveRun, *, is_fatal: bool) -> None:
        self._run = run
        self._is_fatal = is_fatal
        self._has_noted = False
        self._waiting: list[tuple[int, torch.Tensor]] = []

    def saw_loss(self, loss: torch.Tensor, value: float | None) -> None:
        """Look at the loss, or at the one before it."""
        __tracebackhide__ = True
        if value is None and self._is_fatal:
            value = loss.item()
        if value is not None:
            if not math.isfinite(value):
                self._found(value, self._run.recorder.num_steps + 1)
            return
        waiting, self._waiting = (
            self._waiting, [(self._run.recorder.num_steps + 1, loss.detach())],
        )  # fmt: skip
        self._look(waiting)

    def end(self, state: str) -> None:
        """Look at the last one."""
        if state == "finished":
            self._is_fatal = False  # it is over: there is nothing to end
            self._look(self._waiting)

    def _look(self, losses: list[tuple[int, torch.Tensor]]) -> None:
        __tracebackhide__ = True
        for step, loss in losses:
            value = loss.item()
            if not math.isfinite(value):
                self._found(value, step)

    def _found(self, value: float, step: int) -> None:
        __tracebackhide__ = True
        if self._has_noted:
            return
        self._has_noted = True
        text = f"the loss is {value} on rank {self._run.rank} in step {step}"
        if self._is_fatal:
            msg = (
                f"{text}; the weights are those before this step. A smaller learning rate, "
                "gradient clipping or --amp bf16 in place of fp16 may help"
            )
            raise NonFiniteLossError(msg)
        self._run.note(f"{text} (--on-nan stop ends a run there)")


def make(run: ActiveRun, *, is_fatal: bool) -> Part:
    """Return the guard for a run."""
    return NanGuard(run, is_fatal=is_fatal)
