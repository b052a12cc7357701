"""Horovod's all-gather, broadcast and all-to-all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.horovod.sets import ProcessSet, global_process_set
from dtkit.horovod.torch.differentiable import all_gather, all_to_all, broadcast_tensor
from dtkit.horovod.torch.submit import (
    MappedHandle,
    submit_alltoall,
    submit_broadcast,
    submit_gather,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.horovod.controller import Handle

__all__ = [
    "allgather",
    "allgather_async",
    "alltoall",
    "alltoall_async",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allgather",
    "grouped_allgather_async",
]


def allgather(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Return the tensors of all ranks end to end; differentiable.

    They may differ in their first dimension.

    Raises:
        HorovodInternalError: the ranks disagree, or one is gone.
    """
    (result,) = grouped_allgather([tensor], name, process_set)
    return result


def allgather_async(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> MappedHandle:
    """Start `allgather`."""
    return MappedHandle(submit_gather([tensor], name, process_set), lambda results: results[0])


def grouped_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Do `allgather` of several tensors as one; differentiable."""
    return list(all_gather(name, process_set, *tensors))


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start `grouped_allgather`."""
    return submit_gather(tensors, name, process_set)


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Return the root's tensor; differentiable.

    Args:
        tensor: of the same shape and dtype on all ranks.
        root_rank: a rank of the whole job, also in a process set.
        name: what the ranks know it by.
        process_set: the ranks.

    Raises:
        HorovodInternalError: the ranks disagree, or one is gone.
    """
    return broadcast_tensor(tensor, root_rank, name, process_set)


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start `broadcast`."""
    return submit_broadcast(tensor, root_rank, name, process_set)


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Overwrite the tensor with the root's."""
    broadcast_async_(tensor, root_rank, name, process_set).wait()
    return tensor


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> MappedHandle:
    """Start `broadcast_`."""
    handle = submit_broadcast(tensor, root_rank, name, process_set, output=tensor)
    return MappedHandle(handle, lambda _result: tensor)


def alltoall(
    tensor: torch.Tensor,
    splits: Sequence[int] | torch.Tensor | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Send each rank some rows and return those that came; differentiable.

    Args:
        tensor: the rows for the first rank, then those for the second, and so on.
        splits: how many rows each rank gets; None: as many each.
        name: what the ranks know it by.
        process_set: the ranks.

    Returns:
        The rows that came, and, if splits were given, how many from each rank.
    """
    output, received = all_to_all(tensor, splits, name, process_set)
    return output if splits is None else (output, received)


def alltoall_async(
    tensor: torch.Tensor,
    splits: Sequence[int] | torch.Tensor | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> MappedHandle:
    """Start `alltoall`."""
    handle = submit_alltoall(tensor, splits, name, process_set)

    def made(result: tuple[torch.Tensor, list[int]]) -> object:
        output, received = result
        return output if splits is None else (output, torch.tensor(received, dtype=torch.int32))

    return MappedHandle(handle, made)
