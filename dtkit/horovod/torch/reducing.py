"""Horovod's all-reduce, and what waits for ranks and handles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.horovod.context import current
from dtkit.horovod.movement import Nothing
from dtkit.horovod.negotiation import GLOBAL_SET
from dtkit.horovod.reduction import Op
from dtkit.horovod.sets import ProcessSet, global_process_set
from dtkit.horovod.torch.compression import Compression, Compressor
from dtkit.horovod.torch.differentiable import all_reduce
from dtkit.horovod.torch.submit import (
    MappedHandle,
    chosen_op,
    submit_nothing,
    submit_reduce,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.horovod.controller import Handle

__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "Product",
    "Sum",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "barrier",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "join",
    "poll",
    "synchronize",
]

Average = Op.AVERAGE
Sum = Op.SUM
Adasum = Op.ADASUM
Min = Op.MIN
Max = Op.MAX
Product = Op.PRODUCT

Tensors = list[torch.Tensor]


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Return the tensor combined over the ranks; differentiable.

    Args:
        tensor: of the same shape and dtype on all ranks.
        average: the older way to say op=Average or op=Sum.
        name: what the ranks know it by; unnamed ones are numbered in order.
        compression: what it travels as.
        op: Average (the default), Sum, Adasum, Min, Max or Product.
        prescale_factor: multiplies it before.
        postscale_factor: multiplies the result.
        process_set: the ranks.

    Raises:
        HorovodInternalError: the ranks disagree, or one is gone.
    """
    (result,) = grouped_allreduce(
        [tensor], average, name, compression, op, prescale_factor, postscale_factor, process_set
    )
    return result


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> MappedHandle:
    """Start `allreduce`; `synchronize` gives the result."""
    scales = (prescale_factor, postscale_factor)
    chosen = chosen_op(op, average)
    return _first(submit_reduce([tensor], chosen, name, process_set, scales=scales))


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Do `allreduce` in place."""
    handle = allreduce_async_(
        tensor, average, name, op, prescale_factor, postscale_factor, process_set
    )
    handle.wait()
    return tensor


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> MappedHandle:
    """Start `allreduce_`; the tensor holds the result once `synchronize` has returned."""
    scales = (prescale_factor, postscale_factor)
    chosen = chosen_op(op, average)
    handle = submit_reduce([tensor], chosen, name, process_set, scales=scales, outputs=[tensor])
    return MappedHandle(handle, lambda _results: tensor)


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensors:
    """Do `allreduce` of several tensors as one; differentiable."""
    packed = [compression.compress(t) for t in tensors]
    scales = (prescale_factor, postscale_factor)
    results = all_reduce(chosen_op(op, average), scales, name, process_set, *(t for t, _ in packed))
    return [
        compression.decompress(result, ctx)
        for result, (_, ctx) in zip(results, packed, strict=True)
    ]


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start `grouped_allreduce`."""
    scales = (prescale_factor, postscale_factor)
    return submit_reduce(tensors, chosen_op(op, average), name, process_set, scales=scales)


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Sequence[torch.Tensor]:
    """Do `grouped_allreduce` in place."""
    handle = grouped_allreduce_async_(
        tensors, average, name, op, prescale_factor, postscale_factor, process_set
    )
    handle.wait()
    return tensors


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> MappedHandle:
    """Start `grouped_allreduce_`."""
    scales = (prescale_factor, postscale_factor)
    chosen = chosen_op(op, average)
    handle = submit_reduce(tensors, chosen, name, process_set, scales=scales, outputs=tensors)
    return MappedHandle(handle, lambda _results: tensors)


def poll(handle: Handle | MappedHandle) -> bool:
    """Return whether `synchronize` would return at once."""
    return handle.is_done()


def synchronize(handle: Handle | MappedHandle) -> Any:
    """Wait for what a handle stands for, and return its result.

    Raises:
        HorovodInternalError: it failed, here or on another rank.
    """
    return handle.wait()


def join(device: int = -1) -> int:  # noqa: ARG001  Horovod's argument; tensors say where they are
    """Have no more data: contribute zeros to the others' all-reduces until all have joined.

    Returns:
        The rank that joined last.
    """
    context = current()
    answer = context.agree(GLOBAL_SET, "join", Nothing("join"))
    # Ranks that came to their end at different times have counted differently.
    context.counters.clear()
    return int(answer["extras"][0])


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank of the process set is here."""
    submit_nothing("barrier", None, process_set).wait()


def _first(handle: Handle) -> MappedHandle:
    return MappedHandle(handle, lambda results: results[0])
