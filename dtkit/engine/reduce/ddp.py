"""DistributedDataParallel's communication hook: for compressors in it, and to see what it sends."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dtkit.engine.reduce.memory import Compressors
from dtkit.engine.reduce.wire import Averaging, Wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch
    from torch.nn.parallel import DistributedDataParallel

__all__ = ["DdpHook"]


class DdpHook:
    """Lets a DDP model send its gradients compressed while a run lasts, or be watched.

    A hook of DDP's stays for as long as the model, so there is one of these for each
    model; between runs it averages as DDP does without a hook.

    Attributes:
        launching: gives a context in which the collective of a bucket with these
            parameters is called. None: nobody watches.

    Args:
        model: None in a copy that was pickled: it has no hook.
    """

    def __init__(self, model: DistributedDataParallel | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self.is_registered: bool = model is not None
        self.wire: Wire | None = None
        self.launching: Callable[[list[torch.Tensor]], AbstractContextManager[None]] | None = None
        self._compressors: Compressors | None = None

    @classmethod
    def of(cls, model: DistributedDataParallel) -> DdpHook | None:
        """Return the one of a model; None: it has a communication hook of the cell's."""
        states = [state for _, state in model._comm_hooks]  # noqa: SLF001  no other way to know
        for state in states:
            if isinstance(state, DdpHook) and state.is_registered:
                return state
        if any(not isinstance(state, DdpHook) for state in states):
            return None
        made = cls(model)
        try:
            model.register_comm_hook(made, _average)
        except RuntimeError:  # it has one that is built into torch: those are not listed
            return None
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
        with nullcontext() if self.launching is None else self.launching(params):
            return self._start(flat, params)

    def _start(self, flat: torch.Tensor, params: list[torch.Tensor]) -> Averaging:
        if self.wire is not None and self._compressors is not None:
            return Averaging(self.wire, flat, flat[:0], self._compressors.of(params))
        return Averaging(Wire(self._living().process_group), flat, flat[:0])

    def _living(self) -> DistributedDataParallel:
        model = None if self._model is None else self._model()
        assert model is not None  # noqa: S101  whoever asks holds it
        return model

    def __reduce__(self) -> Any:
        return DdpHook, ()


def _average(state: DdpHook, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    flat: torch.Tensor = bucket.buffer()
    averaging = state.average(flat, bucket.parameters())

    def done(_future: Any) -> torch.Tensor:
        averaging.finish(flat, has_arrived=True)
        return flat

    # On a thread of the backend's: it may compute there, but not communicate.
    return averaging.future().then(done)


# torch compares annotations with its own types, and ours are strings.
_average.__annotations__.clear()
