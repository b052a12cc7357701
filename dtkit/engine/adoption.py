"""Optimizers in a run: their models get equal weights, their gradients are averaged.

Ranks must agree on every collective. What is decided here is therefore decided
by what the cell does, which is the same on all ranks, and never by what happens
to be alive: cyclic garbage is collected at other times on other ranks.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from torch.nn.parameter import is_lazy

from dtkit.engine import weights
from dtkit.engine.adopted import Adopted
from dtkit.engine.models import (
    already_distributed,
    averages_itself,
    find_models,
    parameters_of,
    running_statistics,
    sparse_parameters,
    state_of,
)
from dtkit.engine.parallel.layout import layout_of
from dtkit.engine.parallel.norms import own_parts
from dtkit.engine.reduce import GradSynchronizer, Passes
from dtkit.engine.survey import survey, survey_here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch.optim import Optimizer

    from dtkit.engine.parallel.layout import Layout
    from dtkit.engine.parallel.unedited import Sharder
    from dtkit.engine.reduce import Wire

__all__ = ["Adoption"]


class Adoption:
    """Takes over the optimizers of a cell, one by one as they appear.

    Attributes:
        passes: the backward passes; whoever sees one begin and end tells them.
        models: of the optimizer that was adopted or used last.
        num_models: how many models got their weights from the first rank.
        num_averaged: how many optimizers have their gradients averaged, or their weights.
        num_left_alone: how many were left to those who distribute them.

    Args:
        wire: the ranks, and how gradients travel between them.
        passes: the backward passes of the cell.
        note: takes a line for the user.
        arrange: called with a model's layout, if several ranks hold it together.
        sharder: shards models that nobody has laid out.
    """

    def __init__(
        self,
        wire: Wire,
        passes: Passes,
        note: Callable[[str], None],
        arrange: Callable[[Layout], None],
        sharder: Sharder | None = None,
    ) -> None:
        self.passes = passes
        self.models: list[torch.nn.Module] = []
        self.num_models: int = 0
        self.num_averaged: int = 0
        self.num_left_alone: int = 0
        self._wire = wire
        self._group = wire.group
        self._note = note
        self._arrange = arrange
        self._sharder = sharder
        self._noted: set[str] = set()
        self._adopted: WeakKeyDictionary[Optimizer, Adopted] = WeakKeyDictionary()
        self._synchronizers: WeakSet[GradSynchronizer] = WeakSet()
        self._counted: WeakSet[torch.nn.Module] = WeakSet()
        self._unused: list[Optimizer] = []
        self._scale: float | None = None  # of the losses, since something follows it

    def equalize(self, optimizers: Iterable[Optimizer]) -> None:
        """Make the weights of models equal that were there before the cell."""
        held = map(parameters_of, optimizers)  # in parts also where the model is gone
        params = [p for ps in held if not already_distributed(ps, ()) for p in ps]
        models = find_models(params)
        taken = [
            m for m in models if layout_of([m]) or already_distributed(list(m.parameters()), [m])
        ]
        others = {id(p) for m in taken for p in m.parameters()}
        _, state = survey([p for p in params if id(p) not in others], self._group)
        if state:
            weights.equalize(state, self._group)

    def adopt(self, optimizer: Optimizer) -> None:
        """Take over an optimizer's parameters, unless somebody distributes them already."""
        if optimizer not in self._adopted:
            self._adopted[optimizer] = Adopted()
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
            if entry.layout is None and not entry.is_left_alone:
                self._wire.spread(state_of(entry.models, parameters_of(optimizer)))

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
        if self._wire.memory.is_empty:
            return  # asking a GradScaler waits for the device
        before, self._scale = self._scale, scale()
        if before not in (None, self._scale):
            self._wire.memory.rescale(self._scale / before)

    def memory(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what compression has left out so far of an optimizer's gradients, on this rank."""
        entries = self._wire.memory.state(parameters_of(optimizer))
        params, method = entries if any(entries) else [], self._wire.method_of(optimizer)
        return {"method": method, "params": params, "scale": self._scale}

    def remember(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Go on with what `memory` gave; of another method nothing is taken over."""
        if state["method"] == self._wire.method_of(optimizer):
            self._wire.memory.load(parameters_of(optimizer), state["params"])
            self._scale = state["scale"]

    def checksum(self, optimizer: Optimizer) -> str | None:
        """Return what an optimizer's weights are known by, None if they are not ours."""
        entry = self._adopted.get(optimizer)
        if entry is None or entry.is_left_alone or entry.layout is not None:
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
            optimizer.take_part_in(self._wire.memory)  # type: ignore[attr-defined]  # it is ours
            self._leave_alone(optimizer, "hvd.DistributedOptimizer combines its gradients")
            return
        params = [p for p in parameters_of(optimizer) if p.is_leaf]
        if any(is_lazy(p) for p in params):  # until the first forward pass: then again
            entry.num_params = -1
            return
        if self._sharder is not None:
            self._sharder.prepare(params, has_trained=self.passes.num_begun > 0)
            params = [p for p in parameters_of(optimizer) if p.is_leaf]
        entry.num_params = len(parameters_of(optimizer))
        entry.frozen = [p for p in params if not p.requires_grad]
        if self._take_laid_out(entry, params):
            return
        self._wire.before_collective()
        # Free ranks agree on nothing together: the first that lives says what all have.
        is_free = self._wire.strategy.is_free
        models, state = survey_here(params) if is_free else survey(params, self._group)
        reason = already_distributed(params, models)
        if reason is None and not (state and self._wire.spread(state)):
            reason = "its parameters differ between ranks in number or shape (model parallel?)"
        if reason is not None:
            self._leave_alone(optimizer, reason)
            return
        self.num_models += len(set(models) - set(self._counted))
        self._counted.update(models)
        entry.models = self.models = models
        entry.num_taken += 1
        active = [p for p in params if p.requires_grad]
        if active and self._wire.strategy.is_loose:
            self.num_averaged += entry.num_taken == 1
        elif active:
            self._synchronize(entry, active, self._wire)

    def _take_laid_out(self, entry: Adopted, params: Sequence[torch.Tensor]) -> bool:
        """Take over parameters of a model that several ranks hold together, if they are one's."""
        models = find_models(params)
        layout = entry.layout = layout_of(models)
        if layout is not None:
            self._arrange(layout)
            entry.models = self.models = models
            group, shared = layout.to_average(params)
            if group is not None:
                weights.broadcast(own_parts(shared), group)
                active = [p for p in shared if p.requires_grad]
                self._synchronize(entry, active, self._wire.over(group))
        return layout is not None

    def _synchronize(self, entry: Adopted, params: list[torch.Tensor], wire: Wire) -> None:
        own, models = {id(p) for p in params}, entry.models
        memory = self._wire.memory.state(params)
        sparse = [p for p in sparse_parameters(models) if id(p) in own]
        if wire.momentum is not None:
            wire.momentum.excuse([*sparse, *(p for p in params if not p.is_floating_point())])
        synchronizer = GradSynchronizer(
            params,
            wire,
            self.passes,
            sparse=sparse,
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
            other.synchronizers = [s for s in other.synchronizers if not s.is_empty]
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
            self._note(note)
        self._noted.add(note)
