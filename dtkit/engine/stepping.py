"""From gradients to a step: what is accumulated, averaged, unscaled, and in what order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtkit.engine.lrfactor import LrFactor
from dtkit.engine.models import parameters_of
from dtkit.engine.parallel.norms import total_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch.optim.lr_scheduler import LRScheduler

    from dtkit.engine.accumulate import Accumulation
    from dtkit.engine.autopilot import Autopilot
    from dtkit.engine.parallel.layout import Layout
    from dtkit.engine.precision import Precision

__all__ = ["HELD", "REAL", "SKIPPED", "Gate", "Stepping"]

REAL, HELD, SKIPPED = "real", "held", "skipped"
"""What became of a step that the cell has written."""


class Stepping:
    """Makes an optimizer's gradients final before they are used, and a void step do nothing.

    A step is made void by taking the gradients away: optimizers skip parameters
    that have none, whatever their kind, and nothing of theirs need be patched.

    Args:
        accumulation: which written steps are real.
        precision: scales losses; None: nobody does, or the cell.
        autopilot: averages gradients; None: nobody does, or the cell.
    """

    def __init__(
        self,
        accumulation: Accumulation,
        precision: Precision | None,
        autopilot: Autopilot | None,
    ) -> None:
        self.accumulation = accumulation
        self._precision = precision
        self._autopilot = autopilot
        self._outcome = REAL
        self._aside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.lr: LrFactor = LrFactor()
        """What the user multiplies learning rates with while the run goes on; whoever sees a step
        begin applies it, and its end here takes it out."""
        self.ratio: float = 1.0
        """What the last written step weighs in its group."""

    @property
    def layout(self) -> Layout | None:
        """Of a model that several ranks hold together."""
        return None if self._autopilot is None else self._autopilot.layout

    def prepare(self, namespace: Mapping[str, Any]) -> None:
        """Get to know the optimizers that earlier cells made."""
        for value in namespace.values():
            # type(), not isinstance: an arbitrary object's __class__ may run code.
            if issubclass(type(value), Optimizer):
                self.accumulation.made(value)

    def before_backward(self, losses: Sequence[Any]) -> float:
        """End the forward pass; return what the losses are to be multiplied with."""
        scale = 1.0
        if self._precision is not None:
            scale = self._precision.before_backward(losses, may_update=self.accumulation.is_empty)
        if self._autopilot is not None:
            scaler = getattr(losses[0], "__dict__", {}).get("dtkit_scaler") if losses else None
            self._autopilot.follow_scale(scaler.get_scale if scaler else lambda: scale)
        return scale

    def leave_forward(self) -> None:
        """End the forward pass, if there is one: another batch is drawn."""
        if self._precision is not None:
            self._precision.close_window()

    def hold(self, optimizer: Optimizer) -> None:
        """Hold a step back."""
        if self._autopilot is not None:
            self._autopilot.adopt(optimizer)
        self.ratio = self.accumulation.hold(optimizer)

    def before_clipping(self, grads: Sequence[torch.Tensor]) -> bool:
        """Make gradients final, of the whole group; returns whether it is time to clip."""
        owners = self.accumulation.owners(grads) if self._is_involved() else []
        if any(self.accumulation.holds(optimizer) for optimizer in owners):
            return False
        for optimizer in owners:
            self.accumulation.fold(optimizer)
        if self._autopilot is not None:
            self._autopilot.before_clipping(grads)
        if self._precision is not None:
            for optimizer in owners:
                self._precision.unscale(optimizer)
        return True

    def settle(self, optimizer: Optimizer) -> None:
        """Make an optimizer's gradients final: a GradScaler of the cell's looks at them."""
        self._fold(optimizer)
        if self._autopilot is not None:
            self._autopilot.average(optimizer)

    def before_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> str:
        """Make ready for a written step; returns what will become of it."""
        self.leave_forward()
        if closure is not None:
            self._refuse_closure()
        self._outcome = HELD if self.accumulation.holds(optimizer) else REAL
        if self._outcome == HELD:
            self.hold(optimizer)
            return HELD
        self._fold(optimizer)
        if self._autopilot is not None:
            self._autopilot.before_step(optimizer)
        if self._precision is not None and not self._precision.may_step(optimizer):
            self._outcome = SKIPPED
            self._aside = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
            for param, _ in self._aside:
                param.grad = None
        return self._outcome

    def after_step(self, optimizer: Optimizer) -> str:
        """Note that it is over; returns what became of it."""
        outcome, self._outcome = self._outcome, REAL
        if outcome == HELD:
            return HELD
        for param, grad in self._aside:
            param.grad = grad
        self._aside = []
        self.abandon(optimizer)
        return outcome

    def abandon(self, optimizer: Optimizer) -> None:
        """End the group of steps, whether or not it ended in a real one."""
        self.lr.restore()
        self.ratio = self.accumulation.close(optimizer)
        if self._autopilot is not None:
            self._autopilot.after_step(optimizer)

    def state(self, optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
        """Return what a run that goes on from here must know beside the optimizers' own state."""
        memory = {}
        if self._autopilot is not None:
            memory = {name: self._autopilot.adoption.memory(o) for name, o in optimizers.items()}
        return {"memory": memory, "scale": self._precision.state() if self._precision else {}}

    def load(self, optimizers: Mapping[str, Optimizer], state: dict[str, Any]) -> None:
        """Go on with what `state` gave on this rank."""
        if self._precision is not None:
            self._precision.load(state["scale"])
        for name in optimizers.keys() & state["memory"].keys():
            if self._autopilot is not None:
                self._autopilot.adoption.remember(optimizers[name], state["memory"][name])

    def finish(self) -> int:
        """Make the steps that are held back still; return how many were written for them."""
        num_held = 0
        for optimizer, num in self.accumulation.unfinished():
            optimizer.step()
            for param in parameters_of(optimizer):
                param.grad = None
            num_held = max(num_held, num)
        return num_held

    def _fold(self, optimizer: Optimizer) -> None:
        # Asked here: entering torch.no_grad alone costs a step some microseconds.
        if self.accumulation.is_on:
            self.accumulation.fold(optimizer)

    def _is_involved(self) -> bool:
        return self._precision is not None or self.accumulation.is_on

    def _refuse_closure(self) -> None:
        is_scaled = self._precision is not None and self._precision.scales_losses
        if self.accumulation.is_on or is_scaled:
            flag = "--accumulate" if self.accumulation.is_on else "--amp fp16"
            msg = (
                f"{flag}: this optimizer's step computes the loss itself, several times "
                "(step(closure)), so there is no step to hold back or to skip: leave the flag out"
            )
            raise RuntimeError(msg)


class Gate:
    """What of a `Sink` is answered by `Stepping` alone."""

    def __init__(self, stepping: Stepping) -> None:
        self.stepping = stepping

    def holds(self, optimizer: Optimizer) -> bool:
        """Return whether the next step of an optimizer is held back."""
        return self.stepping.accumulation.holds(optimizer)

    def holds_update(self) -> bool:
        """Return whether the last written step was held back."""
        return self.stepping.accumulation.last_was_held

    def holds_schedule(self, scheduler: LRScheduler) -> bool:
        """Return whether a learning rate stays because the optimizer's step was held back."""
        return self.stepping.accumulation.holds_schedule(scheduler)

    def before_unscaling(self, optimizer: Optimizer) -> None:
        """Average first: unscaling looks for infinities."""
        self.stepping.settle(optimizer)

    def before_clipping(self, grads: Sequence[torch.Tensor]) -> bool:
        """Average first: clipping looks at all gradients."""
        return self.stepping.before_clipping(grads)

    def norm_of(self, grads: Sequence[torch.Tensor], order: float) -> torch.Tensor | None:
        """Return the norm of gradients that several ranks hold together; None: they are whole."""
        layout = self.stepping.layout
        if layout is None and not any(isinstance(grad, DTensor) for grad in grads):
            return None
        return total_norm(grads, order, layout)
