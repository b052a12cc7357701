"""Watch: what the hooks in torch see of a cell, told to recorder, autopilot and control."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.feeding import Feeding
from dtkit.engine.parts import HOOKS, listeners
from dtkit.engine.progress import estimate_iterations
from dtkit.engine.stepping import HELD, REAL, SKIPPED, Gate
from dtkit.events import Total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from dtkit.engine.autopilot import Autopilot
    from dtkit.engine.control import Control
    from dtkit.engine.parts import Part
    from dtkit.engine.position import Position
    from dtkit.engine.recorder import Recorder
    from dtkit.engine.stepping import Stepping

__all__ = ["Watch"]

_ESTIMATE_AT_STEP = 2
"""When a run's length is estimated: before, batches may have been drawn to look at them."""

# Any, below: losses, batches and closures are the user's own.


class Watch(Gate):
    """The `Sink` of `observing`: called as the cell trains.

    Attributes:
        lead: the optimizer whose steps are the run's steps.
        position: where the run is in its data.

    Args:
        recorder: takes what is measured.
        control: stops and pauses at the boundaries between steps.
        autopilot: distributes the cell; None: it is left alone.
        stepping: makes gradients final, and decides which steps are real.
        parts: are told the same.
    """

    def __init__(
        self,
        recorder: Recorder,
        control: Control,
        autopilot: Autopilot | None,
        stepping: Stepping,
        parts: Sequence[Part] = (),
    ) -> None:
        self.lead: Optimizer | None = None
        self._recorder = recorder
        self._control = control
        self._autopilot = autopilot
        self._tell = {name: listeners(parts, name) for name in HOOKS}
        super().__init__(stepping)
        self._num_skipped = 0
        self._others: set[int] = set()
        self._feeding = Feeding(
            recorder, autopilot, stepping.accumulation,
            boundary=self._boundary, ask=self._ask, listeners=self._tell["saw_batch"],
        )  # fmt: skip
        self.position: Position = self._feeding.position
        self._in_closure = False
        self._has_closure_loss = False

    def before_backward(self, losses: Sequence[Any], grads: Sequence[Any] | None) -> float:
        """Record the loss; return what this rank's gradient weighs in the global batch."""
        weight, scale = 1.0, self.stepping.before_backward(losses)
        if not self._in_closure:
            self._boundary()
        if self._autopilot is not None:
            weight = self._autopilot.before_backward()
        self._feeding.used()
        for tell in self._tell["before_backward"]:
            tell()
        # An optimizer with a closure evaluates the loss several times in a step;
        # the first is the loss that the step started from.
        if not self._has_closure_loss:
            self._has_closure_loss = self._in_closure
            for i, loss in enumerate(losses):
                if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                    self._saw_loss(loss, None if grads is None else grads[i], weight)
        return weight * scale

    def after_backward(self, *, has_failed: bool) -> None:
        """Make the gradients final."""
        if self._autopilot is not None:
            self._autopilot.after_backward(has_failed=has_failed)
        if not has_failed:
            for tell in self._tell["after_backward"]:
                tell()

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Adopt it."""
        self.stepping.accumulation.made(optimizer)
        if self._autopilot is not None:
            self._autopilot.adopt(optimizer)

    def before_step(self, optimizer: Optimizer, closure: Any) -> Any:
        """Make the gradients final, or let the closure do so."""
        if closure is not None:
            self._boundary()
            self._in_closure = True
        outcome = self.stepping.before_step(optimizer, closure)
        if closure is not None and self._autopilot is not None:
            closure = self._autopilot.shared_closure(optimizer, closure)
        if outcome == REAL:
            for tell in self._tell["before_step"]:
                tell(optimizer)
            self.stepping.lr.apply(optimizer)  # last: a part may set the rate, as a range test does
        return closure

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step and close its record, if it was one."""
        self._in_closure = self._has_closure_loss = False
        outcome = self.stepping.after_step(optimizer)
        if outcome == HELD:
            self._held(optimizer)
        elif outcome == SKIPPED:
            self._skipped()
        elif self._leads(optimizer):
            self._control.stepped()
            self.position.stepped()
            self._recorder.num_steps += 1
            lr = self.stepping.lr.used_by(optimizer)  # before a part may change it
            try:
                for tell in self._tell["after_step"]:
                    tell(optimizer, self._control.num_steps)
            finally:
                # What they send and wait for after the step is this step's, not the next one's.
                self._recorder.stepped(lr, self.stepping.ratio)
            if self._recorder.num_steps == _ESTIMATE_AT_STEP:
                self._estimate_total()
            self._feeding.num_batches = 0

    def step_skipped(self, optimizer: Optimizer) -> None:
        """Forget the step that a GradScaler of the cell's skipped."""
        self.stepping.abandon(optimizer)
        self._skipped()

    def _skipped(self) -> None:
        self._num_skipped += 1
        self._recorder.log({"skipped_steps": float(self._num_skipped)})
        self._recorder.skipped()
        self._feeding.num_batches = 0

    def hold(self, optimizer: Optimizer) -> None:
        """Hold back a step that a GradScaler of the cell's was to make."""
        self.stepping.hold(optimizer)
        self._held(optimizer)

    def iterate(self, loader: DataLoader[Any], original: Callable[..., Any]) -> Iterator[Any]:
        """Return the loader's batches, timed, and divided if it is a training loader."""
        return self._feeding.iterate(loader, original)

    def num_batches(self, loader: DataLoader[Any], original: Callable[..., int]) -> int:
        """Return the number of batches that this rank will get."""
        return self._feeding.length(loader, original)

    def _held(self, optimizer: Optimizer) -> None:
        if self.lead in (None, optimizer):
            self.lead = optimizer
            self._recorder.held(self.stepping.ratio)

    def _boundary(self) -> None:
        __tracebackhide__ = True
        self.stepping.leave_forward()
        if self._control.boundary():
            for tell in self._tell["boundary"]:
                tell(self._control.num_steps)

    def _ask(self) -> None:
        __tracebackhide__ = True
        self._boundary()
        for tell in self._tell["before_batch"]:
            tell()

    def _saw_loss(self, loss: torch.Tensor, given: Any, weight: float) -> None:
        __tracebackhide__ = True
        true_loss = loss.__dict__.get("dtkit_unscaled", loss)
        value = self._recorder.saw_loss(true_loss if given is None else true_loss * given, weight)
        for tell in self._tell["saw_loss"]:
            tell(true_loss, value if given is None else None)

    def _leads(self, optimizer: Optimizer) -> bool:
        """Return whether this optimizer's steps are the run's steps.

        The first one to step leads. Another that steps on the same batch (a GAN's
        second one) belongs to its steps; with a batch of its own, or when it
        steps twice without the leader, it leads from then on.
        """
        if (
            self.lead in (None, optimizer)
            or self._feeding.num_batches > 0
            or id(optimizer) in self._others
        ):
            self.lead = optimizer
            self._others.clear()
            return True
        self._others.add(id(optimizer))
        return False

    def _estimate_total(self) -> None:
        iterations = estimate_iterations(sys._getframe(1))  # noqa: SLF001  the documented way
        if iterations and (iterations := iterations - self.position.num_skipped) > 0:
            total = max(_ESTIMATE_AT_STEP, iterations // max(1, self._feeding.num_batches))
            self._recorder.emit(Total(self._recorder.rank, total))
