"""Collectives as autograd functions: their gradients are collectives too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.horovod.context import current
from dtkit.horovod.reduction import Op
from dtkit.horovod.torch.submit import (
    gather,
    submit_alltoall,
    submit_broadcast,
    submit_gather,
    submit_reduce,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.horovod.sets import ProcessSet

__all__ = ["all_gather", "all_reduce", "all_to_all", "broadcast_tensor", "reduce_scatter"]

# Any: autograd's contexts and what it passes.


class AllReduceFunction(torch.autograd.Function):
    """All-reduces tensors; the gradients are all-reduced in the same way."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, scales: tuple[float, float], name: str | None,
        process_set: ProcessSet, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Reduce."""
        ctx.call = (op, scales, process_set)
        handle = submit_reduce(tensors, op, name, process_set, scales=scales)
        return tuple(handle.wait())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Reduce the gradients."""
        op, scales, process_set = ctx.call
        handle = submit_reduce(grads, op, None, process_set, scales=scales)
        return None, None, None, None, *handle.wait()


class AllGatherFunction(torch.autograd.Function):
    """Gathers tensors; each rank's gradient is its part of the averaged gradients."""

    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: ProcessSet, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Gather."""
        handle, made = gather(tensors, name, process_set)
        gathered = handle.wait()
        ctx.call = (process_set, made.rows)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Average, and take this rank's rows."""
        process_set, rows = ctx.call
        averaged = submit_reduce(grads, Op.AVERAGE, None, process_set).wait()
        me = process_set.rank()
        mine = [
            grad[sum(counts[:me]) : sum(counts[: me + 1])]
            for grad, counts in zip(averaged, rows, strict=True)
        ]
        return None, None, *mine


class BroadcastFunction(torch.autograd.Function):
    """Broadcasts a tensor; the root's gradient is the average of all."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet
    ) -> torch.Tensor:
        """Broadcast."""
        ctx.call = (root_rank, process_set)
        result: torch.Tensor = submit_broadcast(tensor, root_rank, name, process_set).wait()
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Average on the root; the others' tensors were not used."""
        root_rank, process_set = ctx.call
        (averaged,) = submit_reduce(grads, Op.AVERAGE, None, process_set).wait()
        is_root = current().topology.rank == root_rank
        return averaged if is_root else torch.zeros_like(averaged), None, None, None


class AllToAllFunction(torch.autograd.Function):
    """Exchanges rows; the gradients go back where the rows came from."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, splits: Any, name: str | None, process_set: ProcessSet
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exchange."""
        output, received = submit_alltoall(tensor, splits, name, process_set).wait()
        ctx.call = (received, process_set)
        counts = torch.tensor(received, dtype=torch.int32)
        ctx.mark_non_differentiable(counts)
        return output, counts

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Send the gradients back."""
        received, process_set = ctx.call
        grad, _ = submit_alltoall(grads[0], received, None, process_set).wait()
        return grad, None, None, None


class ReduceScatterFunction(torch.autograd.Function):
    """Reduces tensors and scatters them; the gradients are gathered."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, scales: tuple[float, float], name: str | None,
        process_set: ProcessSet, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Reduce and scatter."""
        ctx.call = (op, scales, process_set)
        handle = submit_reduce(tensors, op, name, process_set, scales=scales, is_scattered=True)
        return tuple(handle.wait())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gather the gradients; of a sum, each counts on every rank."""
        op, scales, process_set = ctx.call
        factor = scales[0] * scales[1] * (process_set.size() if op is Op.SUM else 1)
        gathered = submit_gather(grads, None, process_set).wait()
        return None, None, None, None, *(g * factor for g in gathered)


Tensors = tuple[torch.Tensor, ...]

# Each as `forward` takes it, without its context.
all_reduce: Callable[..., Tensors] = AllReduceFunction.apply
all_gather: Callable[..., Tensors] = AllGatherFunction.apply
broadcast_tensor: Callable[..., torch.Tensor] = BroadcastFunction.apply
all_to_all: Callable[..., tuple[torch.Tensor, torch.Tensor]] = AllToAllFunction.apply
reduce_scatter: Callable[..., Tensors] = ReduceScatterFunction.apply
