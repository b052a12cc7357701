"""Replica: what training changes on this rank, as far as dtkit keeps it equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.models import parameters_of, running_statistics, state_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dtkit.engine.adoption import Adoption

__all__ = ["Replica"]


class Replica:
    """The optimizers that make steps in a run, and the weights that they change.

    All of a cell's models travel together, whichever optimizer leads. An optimizer
    that has made no step since the last change of this list is dropped at the next
    one: a cell may train one model after the other. What is alive is never asked:
    that may differ between ranks.

    Args:
        adoption: knows whose weights are ours, and to which models they belong.
    """

    def __init__(self, adoption: Adoption) -> None:
        self._adoption = adoption
        self._known: dict[int, tuple[Optimizer, int]] = {}
        self._used: set[int] = set()

    def saw(self, optimizer: Optimizer) -> bool:
        """Note an optimizer that is about to step; returns whether the weights are others now."""
        number = self._adoption.times_taken(optimizer)
        if number is None:  # somebody else's
            return False
        known = self._known.get(id(optimizer))
        if known is not None and known[1] == number:
            self._used.add(id(optimizer))
            return False
        self._known = {key: value for key, value in self._known.items() if key in self._used}
        self._known[id(optimizer)] = optimizer, number
        self._used = {id(optimizer)}
        return True

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers, in the order of their first step."""
        return [optimizer for optimizer, _ in self._known.values()]

    def weights(self) -> list[torch.Tensor]:
        """Return the parameters that are trained."""
        found = {id(p): p for o in self.optimizers for p in parameters_of(o)}
        return [p for p in found.values() if p.requires_grad and p.is_floating_point()]

    def statistics(self) -> list[torch.Tensor]:
        """Return the running statistics of their models."""
        models = [model for o in self.optimizers for model in self._adoption.models_of(o)]
        found = {id(t): t for t in running_statistics(models)}
        return list(found.values())

    def rest(self) -> list[torch.Tensor]:
        """Return everything else: other buffers, and the state of the optimizers.

        Each rank has its own as long as it makes steps of its own.
        """
        models = [model for o in self.optimizers for model in self._adoption.models_of(o)]
        own = {id(t) for t in [*self.weights(), *self.statistics()]}
        found = [t for t in state_of(models, ()) if id(t) not in own]
        return found + [t for o in self.optimizers for t in _state(o)]


def _state(optimizer: Optimizer) -> list[torch.Tensor]:
    found = []
    for param in parameters_of(optimizer):
        values: dict[str, Any] = optimizer.state.get(param, {})  # Any: as each optimizer keeps it
        found += [values[name] for name in sorted(values) if torch.is_tensor(values[name])]
    return found
