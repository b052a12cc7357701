"""What is known of a parameter, and of a bucket of them, between two steps."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from dtkit.horovod.movement import Room

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.horovod.controller import Handle
    from dtkit.horovod.reduction import AllReduce

__all__ = ["Bucket", "Slot", "dense", "zero"]


class Slot:
    """One parameter's state since the last step."""

    def __init__(self, name: str, param: torch.Tensor) -> None:
        self.name = name
        self.param = param
        self.num_left: int = 1
        self.is_done: bool = False
        self.is_now: bool = False
        """Whether it got a gradient in the pass that is going on."""
        self.is_sparse = False
        """Whether some rank had a sparse gradient: then it travels alone."""
        self._reduced: weakref.ref[torch.Tensor] | None = None

    def reset(self, num_passes: int) -> None:
        """Begin a new step, of so many passes."""
        self.num_left, self.is_done, self.is_now, self._reduced = num_passes, False, False, None

    def note_done(self) -> None:
        """Note that the gradient is reduced."""
        self.is_done = True
        grad = self.param.grad
        self._reduced = None if grad is None else weakref.ref(grad)

    def is_cleared(self) -> bool:
        """Return whether the gradient was thrown away since it was reduced, without a step."""
        return self._reduced is None or self._reduced() is not self.param.grad


class Bucket:
    """Parameters that are reduced by one collective."""

    def __init__(self, number: int, slots: Sequence[Slot]) -> None:
        self.number = number
        self.num_bytes: int = sum(slot.param.nbytes for slot in slots)
        self.slots: list[Slot] = list(slots)
        self.handle: Handle | None = None
        self.sent: AllReduce | None = None
        self.packed: list[tuple[Slot, Any]] = []
        self.room: Room = Room()

        self.num_waiting: int = len(self.slots)
        """Parameters that are not ready yet."""

    def wait(self) -> tuple[AllReduce, list[torch.Tensor]]:
        """Return what was sent and its results, which stay until more is sent."""
        assert self.handle is not None  # noqa: S101  it was sent
        assert self.sent is not None  # noqa: S101
        try:
            sent, results = self.sent, self.handle.wait()
        except BaseException:
            self.abandon()
            raise
        self.handle = self.sent = None
        return sent, results

    def abandon(self) -> None:
        """Forget what may still be under way, and write to other memory than it does."""
        if self.handle is not None:
            self.room = Room()
        self.handle = self.sent = None

    def recount(self) -> None:
        """Count the parameters that are not ready."""
        self.num_waiting = sum(slot.num_left > 0 for slot in self.slots)

    def params(self) -> list[torch.Tensor]:
        """Return the parameters."""
        return [slot.param for slot in self.slots]

    def is_settled(self) -> bool:
        """Return whether nothing is left to reduce."""
        return all(slot.is_done or not slot.param.requires_grad for slot in self.slots)


def dense(grad: torch.Tensor | None, param: torch.Tensor, *, is_left_out: bool) -> torch.Tensor:
    """Return what a parameter contributes; zeros without a gradient."""
    if grad is None or is_left_out:
        return torch.zeros_like(param)
    return grad.to_dense() if grad.is_sparse else grad


def zero(slot: Slot) -> None:
    """Let a parameter that no rank has used have a zero gradient, as Horovod does."""
    if slot.param.grad is None and not slot.is_sparse:
        slot.param.grad = torch.zeros_like(slot.param)
    slot.note_done()
