"""Optimizers in a run: their models get equal weights, their gradients are averaged.

Ranks must agree on every collective. What is decided here is therefore decided
by what the cell does, which is the same on all ranks, and never by what happens
to be alive: cyclic garbage is collected at other times on other ranks.
"""

from __future__ import annotations

import gc
import zlib
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from torch.nn.parameter import is_lazy

from dtkit.engine import weights
from dtkit.engine.models import (
    already_distributed,
    averages_itself,
    find_models,
    live_modules,
    parameters_of,
    running_statistics,
    sparse_parameters,
    state_of,
)
from dtkit.engine.reduce import GradSynchronizer, Passes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch.optim import Optimizer

    from dtkit.engine.reduce import Wire

__all__ = ["Adoption"]


class _Adopted:
    """What is known of one optimizer; the optimizer itself is not kept alive."""

    def __init__(self) -> None:
        self.models: list[torch.nn.Module] = []
        self.synchronizers: list[GradSynchronizer] = []
        self.num_params = 0
        self.frozen: list[torch.Tensor] = []
        self.is_left_alone = False
        self.num_taken = 0

    def is_outdated(self, optimizer: Optimizer) -> bool:
        """Return whether the cell added parameters since, or unfroze some."""
        num_params = sum(len(group["params"]) for group in optimizer.param_groups)
        return num_params != self.num_params or any(p.requires_grad for p in self.frozen)


class Adoption:
    """Takes over the optimizers of a cell, one by one as they appear.

    Attributes:
        passes: the backward passes; whoever sees one begin and end tells them.
        models: of the optimizer that was adopted or used last.
        num_models: how many models got their weights from the first rank.
        num_averaged: how many optimizers have their gradients averaged, or their weights
            where the strategy says so.
        num_left_alone: how many were left to those who distribute them.

    Args:
        wire: the ranks, and how gradients travel between them.
        passes: the backward passes of the cell.
        note: takes a line for the user.
    """

    def __init__(self, wire: Wire, passes: Passes, note: Callable[[str], None]) -> None:
        self.passes = passes
        self.models: list[torch.nn.Module] = []
        self.num_models = 0
        self.num_averaged = 0
        self.num_left_alone = 0
        self._wire = wire
        self._group = wire.group
        self._note = note
        self._noted: set[str] = set()
        self._adopted: WeakKeyDictionary[Optimizer, _Adopted] = WeakKeyDictionary()
        self._synchronizers: WeakSet[GradSynchronizer] = WeakSet()
        self._counted: WeakSet[torch.nn.Module] = WeakSet()
        self._unused: list[Optimizer] = []
        self._scale = 1.0

    def equalize(self, optimizers: Iterable[Optimizer]) -> None:
        """Make the weights of models equal that were there before the cell."""
        params = [p for optimizer in optimizers for p in parameters_of(optimizer)]
        modules = live_modules()
        models = find_models(params, modules)
        taken = [m for m in models if already_distributed(list(m.parameters()), [m])]
        others = {id(p) for m in taken for p in m.parameters()}
        _, state = self._survey([p for p in params if id(p) not in others], modules)
        if state:
            weights.equalize(state, self._group)

    def adopt(self, optimizer: Optimizer) -> None:
        """Take over an optimizer's parameters, unless somebody distributes them already."""
        if optimizer not in self._adopted:
            self._adopted[optimizer] = _Adopted()
            if self._wire.momentum is not None:
                self._wire.momentum.made(optimizer)
            self._take(optimizer)
            self._unused.append(optimizer)

    def before_first_use(self) -> None:
        """Make weights equal again: the cell may have set them since it made the optimizers."""
        unused, self._unused = self._unused, []
        if unused:
            self._wire.before_collective()
        for optimizer in unused:
            entry = self._adopted[optimizer]
            if not entry.is_left_alone:
                weights.broadcast(state_of(entry.models, parameters_of(optimizer)), self._group)

    def before_use(self, optimizer: Optimizer) -> None:
        """Average an optimizer's gradients as far as they are not averaged yet."""
        self.adopt(optimizer)
        entry = self._adopted[optimizer]
        if not entry.is_left_alone:
            if entry.is_outdated(optimizer):
                self._take(optimizer)
            self.passes.flush(entry.synchronizers)

    def before_step(self, optimizer: Optimizer) -> None:
        """Make ready for the optimizer's step."""
        self.before_use(optimizer)
        if self._wire.momentum is not None:
            self._wire.momentum.suspend(optimizer)

    def used(self, optimizer: Optimizer) -> None:
        """Note that the optimizer has made a step."""
        if self._wire.momentum is not None:
            self._wire.momentum.resume(optimizer)
        entry = self._adopted[optimizer]
        self.models = entry.models
        for synchronizer in entry.synchronizers:
            synchronizer.stepped()

    def flush(self, grads: Iterable[torch.Tensor]) -> None:
        """Average these gradients, and those beside them, if they are not averaged yet."""
        wanted = {id(g) for g in grads}
        dirty = [
            s
            for s in self._synchronizers
            if s.is_dirty and any(id(p.grad) in wanted for p in s.params)
        ]
        if dirty:
            self.passes.flush(sorted(dirty, key=lambda s: s.number))

    def follow_scale(self, scale: Callable[[], float]) -> None:
        """Keep what compression remembers in step with the scale of the losses."""
        if self._wire.compression.name == "none":
            return  # asking a GradScaler waits for the device
        factor, self._scale = scale() / self._scale, scale()
        if factor != 1.0:
            self._wire.memory.rescale(factor)

    def memory(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what compression has left out so far of an optimizer's gradients, on this rank."""
        entries = self._wire.memory.state(parameters_of(optimizer))
        return {
            "method": str(self._wire.compression),
            "params": entries if any(entries) else [],
            "scale": self._scale,
        }

    def remember(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Go on with what `memory` gave; of another method nothing is taken over."""
        if state["method"] == str(self._wire.compression):
            self._wire.memory.load(parameters_of(optimizer), state["params"])
            self._scale = state["scale"]

    def checksum(self, optimizer: Optimizer) -> str | None:
        """Return what an optimizer's weights are known by, None if they are not ours."""
        entry = self._adopted.get(optimizer)
        if entry is None or entry.is_left_alone:
            return None
        return str(zlib.crc32(repr(weights.checksums(parameters_of(optimizer))).encode()))

    def times_taken(self, optimizer: Optimizer) -> int | None:
        """Return how often an optimizer's parameters were taken over, None if they are not ours."""
        entry = self._adopted.get(optimizer)
        return None if entry is None or entry.is_left_alone else entry.num_taken

    def models_of(self, optimizer: Optimizer) -> list[torch.nn.Module]:
        """Return the models whose weights an optimizer changes."""
        return self._adopted[optimizer].models

    def release(self, params: Iterable[torch.Tensor], reason: str) -> None:
        """Leave these parameters, and all of their optimizers, to the user."""
        params = list(params)
        own = {id(p) for p in params}
        for synchronizer in list(self._synchronizers):
            synchronizer.drop(params)
        for optimizer, entry in list(self._adopted.items()):
            if not entry.is_left_alone and own.intersection(map(id, parameters_of(optimizer))):
                self._leave_alone(optimizer, reason)

    def close(self) -> None:
        """Remove every hook."""
        if self._wire.momentum is not None:
            self._wire.momentum.close()
        self.passes.close()
        for synchronizer in list(self._synchronizers):
            synchronizer.close()

    def _take(self, optimizer: Optimizer) -> None:
        """Take over all of an optimizer's parameters, also from another one's synchronizer."""
        entry = self._adopted[optimizer]
        if averages_itself(optimizer):
            self.passes.left_to_horovod()
            self._leave_alone(optimizer, "hvd.DistributedOptimizer combines its gradients")
            return
        params = [p for p in parameters_of(optimizer) if p.is_leaf]
        if any(is_lazy(p) for p in params):  # until the first forward pass: then again
            entry.num_params = -1
            return
        entry.num_params = len(parameters_of(optimizer))
        entry.frozen = [p for p in params if not p.requires_grad]
        self._wire.before_collective()
        models, state = self._survey(params)
        reason = already_distributed(params, models)
        if reason is None and not state:
            reason = "its parameters differ between ranks in number or shape (model parallel?)"
        if reason is not None:
            self._leave_alone(optimizer, reason)
            return
        weights.broadcast(state, self._group)
        self._count(models)
        entry.models = self.models = models
        entry.num_taken += 1
        active = [p for p in params if p.requires_grad]
        if active and self._wire.strategy.is_loose:
            self.num_averaged += entry.num_taken == 1
        elif active:
            self._synchronize(entry, active)

    def _survey(
        self, params: Sequence[torch.Tensor], modules: Sequence[torch.nn.Module] | None = None
    ) -> tuple[list[torch.nn.Module], list[torch.Tensor]]:
        """Return the models of the parameters, and all that is to be equal on all ranks.

        Both are empty if the ranks have different parameters.
        """
        for is_clean in (False, True):
            if is_clean:
                gc.collect()  # a dead model that holds one of these may live on some ranks only
                modules = None
            models = find_models(params, modules)
            state = state_of(models, params)
            if weights.are_alike(state, self._group):
                return models, state
        return [], list(params) if weights.are_alike(params, self._group) else []

    def _count(self, models: list[torch.nn.Module]) -> None:
        self.num_models += sum(model not in self._counted for model in models)
        self._counted.update(models)

    def _synchronize(self, entry: _Adopted, params: list[torch.Tensor]) -> None:
        own, models = {id(p) for p in params}, entry.models
        memory = self._wire.memory.state(params)
        synchronizer = GradSynchronizer(
            params,
            self._wire,
            self.passes,
            sparse=[p for p in sparse_parameters(models) if id(p) in own],
            tensors=lambda: running_statistics(models),
        )
        self.num_averaged += not entry.synchronizers
        # Optimizers may share parameters: whoever came before uses the new one too.
        for other in list(self._adopted.values()):
            is_shared = any(own.intersection(map(id, s.params)) for s in other.synchronizers)
            if is_shared or other is entry:
                other.synchronizers.append(synchronizer)
        for old in list(self._synchronizers):
            old.drop(params)
        for other in list(self._adopted.values()):
            other.synchronizers = [s for s in other.synchronizers if s.params]
        self._synchronizers.add(synchronizer)
        self._wire.memory.load(params, memory)

    def _leave_alone(self, optimizer: Optimizer, reason: str) -> None:
        self._wire.not_used_by(type(optimizer).__name__, reason)
        entry = self._adopted[optimizer]
        entry.is_left_alone = True
        self.num_left_alone += 1
        self.num_averaged -= bool(entry.synchronizers)
        for synchronizer in entry.synchronizers:
            synchronizer.close()
        entry.synchronizers = []
        note = f"{type(optimizer).__name__} left alone: {reason}"
        if note not in self._noted:  # an optimizer, and the one that was made of it
            self._noted.add(note)
            self._note(note)
