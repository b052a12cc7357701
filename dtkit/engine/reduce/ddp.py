"""The compressors in DistributedDataParallel, as its communication hook."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from dtkit.engine.reduce.memory import Compressors
from dtkit.engine.reduce.wire import Averaging, Wire

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

__all__ = ["CompressedDdp"]


class CompressedDdp:
    """Lets a DDP model send its gradients compressed while a run lasts.

    A hook of DDP's stays for as long as the model, so there is one of these for each
    model; between runs it averages as DDP does without a hook.

    Args:
        model: None in a copy that was pickled: it has no hook.
    """

    def __init__(self, model: DistributedDataParallel | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self.is_registered = model is not None
        self.wire: Wire | None = None
        self._compressors: Compressors | None = None

    @classmethod
    def of(cls, model: DistributedDataParallel) -> CompressedDdp | None:
        """Return the one of a model; None: it has a communication hook of the cell's."""
        states = [state for _, state in model._comm_hooks]  # noqa: SLF001  no other way to know
        for state in states:
            if isinstance(state, CompressedDdp) and state.is_registered:
                return state
        if any(not isinstance(state, CompressedDdp) for state in states):
            return None
        made = cls(model)
        model.register_comm_hook(made, _average)
        return made

    def begin(self, wire: Wire) -> None:
        """Compress from now on."""
        self.wire = wire
        self._compressors = Compressors(wire, self._living().parameters())

    def end(self) -> None:
        """Send gradients as they are from now on."""
        self.wire = self._compressors = None

    def average(self, flat: torch.Tensor, params: list[torch.Tensor]) -> Averaging:
        """Start to average a bucket."""
        if self.wire is not None and self._compressors is not None:
            return Averaging(self.wire, flat, flat[:0], self._compressors.of(params))
        return Averaging(Wire(self._living().process_group), flat, flat[:0])

    def _living(self) -> DistributedDataParallel:
        model = None if self._model is None else self._model()
        assert model is not None  # noqa: S101  whoever asks holds it
        return model

    def __reduce__(self) -> Any:
        return CompressedDdp, ()


def _average(state: CompressedDdp, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    flat: torch.Tensor = bucket.buffer()
    averaging = state.average(flat, bucket.parameters())

    def done(_future: Any) -> torch.Tensor:
        averaging.finish(flat)
        return flat

    # On a thread of the backend's: it may compute there, but not communicate.
    return averaging.future().then(done)


# torch compares annotations with its own types, and ours are strings.
_average.__annotations__.clear()
