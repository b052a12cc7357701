"""Parts: what takes part in a run on a rank beside recorder, autopilot and control.

A feature that needs to see training is a `Part`, made by a function that the run's options
name. The run need not know it. Small ones are here; others have a package of their own
(`checkpointing`, `loose`, `trace`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch.optim import Optimizer

    from dtkit.engine.run import ActiveRun

__all__ = ["HOOKS", "Part", "listeners", "make_parts"]

HOOKS = (
    "before_batch",
    "saw_batch",
    "saw_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "boundary",
)
"""What is called while the cell trains; most parts need one or two of these."""


class Part:
    """Sees one run on one rank; every method does nothing unless it is overridden.

    They are called on the training thread, in program order, and on all ranks
    alike. What they raise ends the cell.
    """

    def begin(self) -> None:
        """The cell begins."""

    def before_batch(self) -> None:
        """A batch that may train is about to be drawn from a DataLoader."""

    def saw_batch(self, wait_s: float) -> None:
        """The cell has got a batch from a DataLoader, after waiting so long for it."""

    def waited(self, seconds: float) -> None:
        """The rank has waited so long for other ranks' gradients, until now."""

    def saw_loss(self, loss: torch.Tensor, value: float | None) -> None:
        """A loss (one element, not scaled) is about to be backpropagated.

        Args:
            loss: the loss.
            value: the same as a number, None if it is on a device still.
        """

    def before_backward(self) -> None:
        """A backward pass begins."""

    def after_backward(self) -> None:
        """A backward pass has ended, and gradients that were due are averages."""

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step; its gradients are final."""

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """The run's leading optimizer has made its step number `step`, from 1."""

    def boundary(self, step: int) -> None:
        """All ranks are between step number `step` and the next: a whole state can be taken."""

    def end(self, state: str) -> None:
        """The cell has ended: finished, stopped or failed. Called once, whatever happened."""


def listeners(parts: Iterable[Part], hook: str) -> tuple[Callable[..., None], ...]:
    """Return the methods of that name which do something: a step costs microseconds."""
    return tuple(
        getattr(part, hook)
        for part in parts
        if getattr(type(part), hook) is not getattr(Part, hook)
    )


def make_parts(run: ActiveRun, wanted: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Part, ...]:
    """Return the parts that a run's options name as `module:function` with arguments."""
    parts = []
    for name, arguments in wanted:
        module, _, function = name.partition(":")
        parts.append(getattr(importlib.import_module(module), function)(run, **arguments))
    return tuple(parts)
