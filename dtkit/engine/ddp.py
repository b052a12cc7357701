"""A cell that wraps its model in DistributedDataParallel itself: what it gets, what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.engine.reduce.ddp import compress_ddp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from dtkit.engine.reduce import Wire

__all__ = ["making_ddp"]


def making_ddp(
    wire: Wire,
    stand_back: Callable[[Iterable[torch.Tensor], str], None],
    original: Callable[..., None],
    *,
    is_deferred: bool,
) -> Callable[..., None]:
    """Return what takes the place of DistributedDataParallel's constructor.

    Args:
        wire: how gradients are to travel.
        stand_back: called with the parameters that are DDP's from now on, and why.
        original: the constructor.
        is_deferred: whether gradients are to be accumulated, which DDP leaves to the cell.
    """

    def __init__(ddp: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if is_deferred:
            msg = (
                "--accumulate: this cell wraps its model in DistributedDataParallel, which "
                "averages in every backward pass. Accumulate in the cell, with no_sync(), or "
                "leave the wrapping out and dtkit does both"
            )
            raise RuntimeError(msg)
        stand_back(module.parameters(), "its model is wrapped in DistributedDataParallel")
        original(ddp, module, *args, **kwargs)
        if wire.compression.name != "none":
            compress_ddp(ddp, wire.over(ddp.process_group))

    return __init__
