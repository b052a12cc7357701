"""The asynchronous forms of all collectives; each returns a handle for `synchronize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.horovod.context import current
from dtkit.horovod.movement import AllGather, AllToAll, Broadcast, Nothing
from dtkit.horovod.reduction import AllReduce, Op, ReduceScatter
from dtkit.horovod.sets import ProcessSet, global_process_set, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.horovod.controller import Collective, Handle

__all__ = [
    "MappedHandle",
    "chosen_op",
    "submit_alltoall",
    "submit_broadcast",
    "submit_gather",
    "submit_nothing",
    "submit_reduce",
]


class MappedHandle:
    """A handle whose result is made of another's.

    Args:
        handle: the other.
        make: makes the result, once.
    """

    def __init__(self, handle: Handle, make: Callable[[Any], Any]) -> None:
        self._handle = handle
        self._make = make
        self._result: list[Any] = []

    def is_done(self) -> bool:
        """Return whether `wait` would return at once."""
        return self._handle.is_done()

    def wait(self) -> Any:
        """Return the result, once it is there."""
        if not self._result:
            self._result.append(self._make(self._handle.wait()))
        return self._result[0]


def chosen_op(op: Op | None, average: bool | None) -> Op:
    """Return the operation that a call means.

    Raises:
        ValueError: both were given.
    """
    if op is not None and average is not None:
        msg = "give op= or the older average=, not both"
        raise ValueError(msg)
    if op is not None:
        return op
    return Op.SUM if average is False else Op.AVERAGE


def submit_reduce(
    tensors: Sequence[torch.Tensor],
    op: Op,
    name: str | None,
    process_set: ProcessSet = global_process_set,
    *,
    scales: tuple[float, float] = (1.0, 1.0),
    outputs: Sequence[torch.Tensor] | None = None,
    is_scattered: bool = False,
) -> Handle:
    """Submit an all-reduce, or a reduce-scatter, of some tensors as one."""
    context, number = current(), number_of(process_set)
    group = context.group_of(number)
    made: Collective
    if is_scattered:
        if op not in (Op.SUM, Op.AVERAGE):
            msg = f"reducescatter knows hvd.Sum and hvd.Average, not hvd.{op.name.title()}"
            raise NotImplementedError(msg)
        _check_dims(tensors, "reducescatter")
        made = ReduceScatter(tensors, op, group, scales=scales)
    else:
        if op is Op.ADASUM:
            _check_adasum(tensors, group.size())
        made = AllReduce(tensors, op, group, scales=scales, outputs=outputs)
    return context.submit(number, "reducescatter" if is_scattered else "allreduce", name, made)


def submit_gather(
    tensors: Sequence[torch.Tensor], name: str | None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Submit an all-gather of some tensors; the result lists them."""
    return gather(tensors, name, process_set)[0]


def gather(
    tensors: Sequence[torch.Tensor], name: str | None, process_set: ProcessSet
) -> tuple[Handle, AllGather]:
    """Submit an all-gather; returns also the collective, which knows each rank's rows."""
    context, number = current(), number_of(process_set)
    _check_dims(tensors, "allgather")
    made = AllGather(tensors, context.group_of(number))
    return context.submit(number, "allgather", name, made), made


def submit_broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet = global_process_set,
    *,
    output: torch.Tensor | None = None,
) -> Handle:
    """Submit a broadcast; `output` is where it goes, None for a new tensor."""
    context, number = current(), number_of(process_set)
    group = context.group_of(number)
    if root_rank not in context.members[number]:
        msg = f"root_rank={root_rank} is not in {process_set}"
        raise ValueError(msg)
    target = torch.empty_like(tensor).copy_(tensor.detach()) if output is None else output
    made = Broadcast(tensor, root_rank, group, target)
    return context.submit(number, "broadcast", name, made)


def submit_alltoall(
    tensor: torch.Tensor,
    splits: Sequence[int] | torch.Tensor | None,
    name: str | None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit an all-to-all; its result is the rows and how many came from each rank."""
    context, number = current(), number_of(process_set)
    group = context.group_of(number)
    _check_dims([tensor], "alltoall")
    made = AllToAll(tensor, _checked_splits(tensor, splits, group.size()), group)
    return context.submit(number, "alltoall", name, made)


def submit_nothing(kind: str, name: str | None, process_set: ProcessSet) -> Handle:
    """Submit a barrier: there is nothing to carry."""
    return current().submit(number_of(process_set), kind, name, Nothing(kind))


def _check_dims(tensors: Sequence[torch.Tensor], kind: str) -> None:
    if any(t.dim() == 0 for t in tensors):
        msg = f"{kind} works along the first dimension, and a scalar has none: use t.reshape(1)"
        raise ValueError(msg)


def _check_adasum(tensors: Sequence[torch.Tensor], size: int) -> None:
    if size & (size - 1):
        msg = f"hvd.Adasum wants a number of ranks that is a power of two, not {size}"
        raise NotImplementedError(msg)
    if not all(t.is_floating_point() for t in tensors):
        msg = "hvd.Adasum works on floating-point tensors"
        raise ValueError(msg)


def _checked_splits(
    tensor: torch.Tensor, splits: Sequence[int] | torch.Tensor | None, size: int
) -> list[int]:
    rows = tensor.shape[0]
    if splits is None:
        if rows % size:
            msg = f"alltoall: {rows} rows do not divide among {size} ranks; give splits="
            raise ValueError(msg)
        return [rows // size] * size
    if isinstance(splits, torch.Tensor) and (
        splits.is_floating_point() or splits.dtype is torch.bool
    ):
        msg = f"alltoall: splits are whole numbers, not {splits.dtype}"
        raise ValueError(msg)
    listed = [int(n) for n in splits]
    if len(listed) != size or min(listed) < 0 or sum(listed) > rows:
        msg = f"alltoall: splits {listed} do not divide {rows} rows among {size} ranks"
        raise ValueError(msg)
    return listed
