"""What compressors remember of parameters: it outlives buckets, and goes into checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from dtkit.engine.reduce.compressors import IN_GRADIENT_UNITS, make_compressor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from dtkit.engine.reduce.compressors import Compressor
    from dtkit.engine.reduce.wire import Wire

__all__ = ["Compressors", "Memory"]

Entry = dict[str, Any]  # Any: tensors, and numbers
"""What is remembered of one parameter."""


class Memory:
    """All compressors of one run."""

    def __init__(self) -> None:
        self._all: WeakSet[Compressors] = WeakSet()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that compresses."""
        return not self._all

    def add(self, compressors: Compressors) -> None:
        """Note some compressors."""
        self._all.add(compressors)

    def state(self, params: Iterable[torch.Tensor]) -> list[Entry]:
        """Return what is remembered of parameters on this rank, in their order; copies."""
        known = {key: entry for one in self._all for key, entry in one.state().items()}
        return [known.get(id(p), {}) for p in params]

    def load(self, params: Sequence[torch.Tensor], entries: Sequence[Entry]) -> None:
        """Let whoever compresses these parameters go on with what `state` gave."""
        wanted = {id(p): entry for p, entry in zip(params, entries, strict=False) if entry}
        for one in self._all:
            one.load(wanted)

    def rescale(self, factor: float) -> None:
        """Keep it in the gradients' units: their scale has changed by this factor."""
        for one in self._all:
            one.rescale(factor)


class Compressors:
    """The compressors of a set of parameters, one for each bucket.

    Buckets are cut anew when a model moves, when parameters come and go, and by
    DDP after its first pass; what is remembered goes along, parameter by parameter.

    Args:
        wire: the ranks, and the compression.
        params: the parameters.
    """

    def __init__(self, wire: Wire, params: Iterable[torch.Tensor]) -> None:
        self._wire = wire
        self._own = {id(p) for p in params}
        self._made: dict[tuple[int, ...], Compressor] = {}
        self._memory: dict[int, Entry] = {}
        """Of parameters whose bucket has no compressor now."""
        if wire.compression.name != "none":
            wire.memory.add(self)

    def of(self, params: Sequence[torch.Tensor]) -> Compressor | None:
        """Return the compressor of the bucket that holds these; None: it is sent as it is."""
        key, layout = tuple(map(id, params)), self._wire.layout_of(params)
        made = self._made.get(key)
        if made is None or (made.layout.dtype, made.layout.device) != (layout.dtype, layout.device):
            self._put_by(set(key))
            made = make_compressor(self._wire.compression, layout)
            if made is None:
                return None
            made.load([self._memory.pop(i, {}) for i in key])
            self._made[key] = made
        return made

    def state(self) -> dict[int, Entry]:
        """Return what is remembered, by the parameters' ids; copies."""
        known = {key: dict(entry) for key, entry in self._memory.items()}
        for key, made in self._made.items():
            known.update(zip(key, made.state(), strict=True))
        return known

    def load(self, memory: dict[int, Entry]) -> None:
        """Take over what was remembered of parameters; of others nothing changes."""
        memory = {key: entry for key, entry in memory.items() if key in self._own}
        self._put_by(set(memory))
        self._memory.update(memory)

    def drop(self, params: Iterable[torch.Tensor]) -> None:
        """Forget parameters."""
        gone = {id(p) for p in params}
        self._put_by(gone)
        self._own -= gone
        for key in gone:
            self._memory.pop(key, None)

    def rescale(self, factor: float) -> None:
        """Multiply what is remembered."""
        for made in self._made.values():
            made.rescale(factor)
        for entry in self._memory.values():
            for name in IN_GRADIENT_UNITS.intersection(entry):
                entry[name] = entry[name] * factor

    def _put_by(self, params: set[int]) -> None:
        """Take the memory of every bucket that holds one of these, and the bucket's compressor."""
        for key in [key for key in self._made if params.intersection(key)]:
            self._memory.update(zip(key, self._made.pop(key).state(), strict=True))
