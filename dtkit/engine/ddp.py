"""A cell that wraps its model in DistributedDataParallel itself: what it gets, what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from dtkit.engine.models import BY_DDP, live_replicas
from dtkit.engine.reduce.ddp import DdpHook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from dtkit.engine.reduce import Wire

__all__ = ["UsersDdp"]


class UsersDdp:
    """The DDP models of a cell.

    Args:
        wire: how gradients are to travel.
        stand_back: called with the parameters that are DDP's from now on, and why.
        note: takes a line for the user.
        is_deferred: whether gradients are to be accumulated, which DDP leaves to the cell.
    """

    def __init__(
        self,
        wire: Wire,
        stand_back: Callable[[Iterable[torch.Tensor], str], None],
        note: Callable[[str], None],
        *,
        is_deferred: bool,
    ) -> None:
        self._wire = wire
        self._stand_back = stand_back
        self._note = note
        self._is_deferred = is_deferred
        self._compressed: WeakSet[DdpHook] = WeakSet()

    def making(self, original: Callable[..., None]) -> Callable[..., None]:
        """Return what takes the place of DDP's constructor."""

        def __init__(ddp: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if self._is_deferred:
                msg = (
                    "--accumulate: this cell wraps its model in DistributedDataParallel, which "
                    "averages in every backward pass. Accumulate in the cell, with no_sync(), or "
                    "leave the wrapping out and dtkit does both"
                )
                raise RuntimeError(msg)
            self._stand_back(module.parameters(), BY_DDP)
            original(ddp, module, *args, **kwargs)
            self._compress(ddp)

        return __init__

    def found(self) -> None:
        """Compress what models of earlier cells send, too."""
        if self._wire.compression.name != "none":
            for model in live_replicas():
                self._compress(model)

    def close(self) -> None:
        """Let the models send as DDP does."""
        for one in self._compressed:
            one.end()

    def _compress(self, model: Any) -> None:
        if self._wire.compression.name != "none":
            one = DdpHook.of(model)
            if one is None:
                self._note(
                    "--compress: a DistributedDataParallel model has a communication hook of its "
                    "own, which decides how its gradients travel: left to it"
                )
                return
            one.begin(self._wire.over(model.process_group))
            self._compressed.add(one)
