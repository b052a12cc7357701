"""Strategies in rounds: some steps on each rank, then all ranks are brought together at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dtkit.engine import weights
from dtkit.engine.loose.flat import Flat
from dtkit.engine.loose.replica import Replica
from dtkit.engine.parts import Part
from dtkit.engine.reduce.wire import num_reduced_bytes

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.adoption import Adoption
    from dtkit.engine.recorder import Recorder
    from dtkit.engine.reduce import Wire

__all__ = ["DiLoCo", "LocalSGD", "Rounds"]

OUTER_LR = 0.7
OUTER_MOMENTUM = 0.9
"""source: Douillard et al., DiLoCo, 2023, section 3 (Nesterov, the best of those tried)."""


class Rounds(Part):
    """Lets each rank make some steps, and then averages over the ranks, again and again.

    Ranks may make different numbers of steps, such as when one skips a step: who has come
    to its end takes part in the others' rounds until all have come there.

    Args:
        adoption: knows whose weights are ours.
        wire: the ranks.
        recorder: takes what is measured.
        every: steps of a round.
    """

    def __init__(self, adoption: Adoption, wire: Wire, recorder: Recorder, *, every: int) -> None:
        self._replica = Replica(adoption)
        self._wire = wire
        self._recorder = recorder
        self._every = every
        self._num_steps = 0
        self._flat: Flat | None = None
        self._num_weights = 0
        """Elements of the vector that are parameters; after them come running statistics."""

    def begun(self) -> None:
        """The weights that are trained are these from now on, equal on all ranks."""

    def combine(self, own: torch.Tensor, mean: torch.Tensor) -> None:
        """Put into `mean`, the average of the ranks' weights, what a new round begins with."""

    def before_step(self, optimizer: Optimizer) -> None:
        """See whether the optimizer is a new one."""
        if not self._replica.saw(optimizer):
            return
        self._finish()  # a model that has trained before this one joined
        trained, statistics = self._replica.weights(), self._replica.statistics()
        self._flat = Flat([*trained, *statistics], num_extra=2) if trained else None
        if self._flat is not None:
            self._num_weights = sum(t.numel() for t in trained)
            self._flat.read()
            self.begun()
            self._wire.on_sent(0.0, 0.0)  # steps before the first round's end send nothing

    def after_step(self, optimizer: Optimizer, step: int) -> None:  # noqa: ARG002  a Part's
        """End the round if it was its last step."""
        self._num_steps += 1
        if self._flat is not None and self._num_steps >= self._every:
            self._round(self._flat, is_last=False)

    def end(self, state: str) -> None:
        """Make everything equal on all ranks."""
        if state == "failed" or self._flat is None:
            return
        self._finish()
        rest = self._replica.rest()
        if weights.are_alike(rest, self._wire.group):
            weights.broadcast(rest, self._wire.group)

    def _finish(self) -> None:
        """Go on with rounds until all ranks have come here."""
        while self._flat is not None and not self._round(self._flat, is_last=True):
            pass

    def _round(self, flat: Flat, *, is_last: bool) -> bool:
        """Bring the ranks together; returns whether all of them have come to their end."""
        begun_s = time.perf_counter()
        own = flat.read().clone()
        is_over, num_steps = self._average(flat, is_last=is_last)
        mean = flat.values
        if self._num_steps:
            spread = torch.linalg.vector_norm(own - mean) / torch.linalg.vector_norm(mean)
            self._recorder.log({"divergence": spread})
        if num_steps:
            trained = slice(0, self._num_weights)
            self.combine(own[trained], mean[trained])
        else:
            self.restore(mean[: self._num_weights])
        flat.write()
        self._num_steps = 0
        self._recorder.waited(time.perf_counter() - begun_s)
        return is_over

    def restore(self, mean: torch.Tensor) -> None:
        """Put into `mean` what the round began with, since no rank has made a step in it."""

    def _average(self, flat: Flat, *, is_last: bool) -> tuple[bool, float]:
        """Average over the ranks; returns whether all are at their end, and the mean of steps."""
        group = self._wire.group
        flat.extra[0], flat.extra[1] = float(is_last), float(self._num_steps)
        flat.vector.div_(group.size())
        dist.all_reduce(flat.vector, group=group)
        num_bytes = flat.vector.numel() * flat.vector.element_size()
        sent_bytes = num_reduced_bytes(num_bytes, group.size())
        self._wire.on_sent(sent_bytes, sent_bytes)
        share, num_steps = flat.extra.tolist()
        # A sum of N times 1/N is not always 1; the next smaller share is far from it.
        return share > 1 - 0.5 / group.size(), num_steps


class LocalSGD(Rounds):
    """Averages the weights after some steps.

    source: Stich, Local SGD Converges Fast and Communicates Little, 2019.
    """


class DiLoCo(Rounds):
    """Takes the way that the ranks went in a round, on average, as the gradient of an outer step.

    source: Douillard et al., DiLoCo: Distributed Low-Communication Training of Language
    Models, 2023, algorithm 1. The inner optimizer is the cell's own; the outer one is SGD
    with Nesterov momentum.
    """

    _outer: torch.Tensor
    _momentum: torch.Tensor

    def begun(self) -> None:
        """Begin with these weights, and no momentum."""
        assert self._flat is not None  # noqa: S101  for the type checker: just made
        self._outer = self._flat.values[: self._num_weights].clone()
        self._momentum = torch.zeros_like(self._outer)

    def combine(self, own: torch.Tensor, mean: torch.Tensor) -> None:  # noqa: ARG002
        """Make the outer step."""
        gradient = self._outer - mean
        self._momentum.mul_(OUTER_MOMENTUM).add_(gradient)
        self._outer.sub_(gradient.add_(self._momentum, alpha=OUTER_MOMENTUM), alpha=OUTER_LR)
        mean.copy_(self._outer)

    def restore(self, mean: torch.Tensor) -> None:
        """Stay where the last outer step led to."""
        mean.copy_(self._outer)
