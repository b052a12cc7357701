"""Horovod's reduce-scatter, and the all-reduce of sparse tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.horovod.reduction import Op
from dtkit.horovod.sets import ProcessSet, global_process_set
from dtkit.horovod.torch.compression import Compression, Compressor
from dtkit.horovod.torch.differentiable import reduce_scatter
from dtkit.horovod.torch.submit import MappedHandle, submit_gather, submit_reduce

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.horovod.controller import Handle

__all__ = [
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
]


def sparse_allreduce_async(
    tensor: torch.Tensor,
    name: str | None,
    op: Op,
    process_set: ProcessSet = global_process_set,
) -> Callable[[], torch.Tensor]:
    """Start adding (or averaging) sparse tensors; call what it returns for the result."""
    if op not in (Op.SUM, Op.AVERAGE):
        msg = f"sparse tensors are summed or averaged, not combined by {op.name.title()}"
        raise NotImplementedError(msg)
    tensor = tensor.coalesce()
    indices, values = tensor.indices().t().contiguous(), tensor.values()
    handle = submit_gather(
        [indices, values], None if name is None else f"sparse.{name}", process_set
    )

    def finish() -> torch.Tensor:
        indices, values = handle.wait()
        if op is Op.AVERAGE:
            values = values / process_set.size()
        return torch.sparse_coo_tensor(indices.t(), values, tensor.shape).coalesce()

    return finish


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Return this rank's rows of the tensor combined over the ranks; differentiable.

    If the rows do not divide, the first ranks get one more.

    Raises:
        HorovodInternalError: the ranks disagree, or one is gone.
    """
    (result,) = grouped_reducescatter(
        [tensor], name, compression, op, process_set, prescale_factor, postscale_factor
    )
    return result


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> MappedHandle:
    """Start `reducescatter`."""
    handle = grouped_reducescatter_async(
        [tensor], name, op, process_set, prescale_factor, postscale_factor
    )
    return MappedHandle(handle, lambda results: results[0])


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """Do `reducescatter` of several tensors as one; differentiable."""
    packed = [compression.compress(t) for t in tensors]
    results = reduce_scatter(
        op, (prescale_factor, postscale_factor), name, process_set, *(t for t, _ in packed)
    )
    return [
        compression.decompress(result, ctx)
        for result, (_, ctx) in zip(results, packed, strict=True)
    ]


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: Op = Op.AVERAGE,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start `grouped_reducescatter`."""
    scales = (prescale_factor, postscale_factor)
    return submit_reduce(tensors, op, name, process_set, scales=scales, is_scattered=True)
