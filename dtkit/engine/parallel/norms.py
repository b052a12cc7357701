"""The norm of gradients of which every rank has a part."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.engine.parallel.layout import Layout

# Any, below: a tensor, or None for a gradient that is not there.

__all__ = ["own_part", "own_parts", "total_norm"]


def own_part(tensor: Any) -> Any:
    """Return what of a tensor lies on this rank; a change to it is one to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_parts(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what of these tensors lies on this rank."""
    return [own_part(tensor) for tensor in tensors]


@torch.no_grad()
def total_norm(
    tensors: Sequence[torch.Tensor], order: float, layout: Layout | None
) -> torch.Tensor:
    """Return the norm of all of these tensors, as if each were whole; a collective.

    Args:
        tensors: sharded ones, and such as lie on every rank.
        order: of the norm; may be infinite.
        layout: of their model. If it is pipelined, other ranks have other tensors.
    """
    totals: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for tensor in tensors:
        power = torch.linalg.vector_norm(own_part(tensor), order).double()
        totals.setdefault(_groups(tensor, layout), []).append(
            power if math.isinf(order) else power**order
        )
    if layout is not None and layout.kind == "pipelined":
        totals.setdefault(_groups(None, layout), [])  # a stage may have no gradient at all
    device = tensors[0].device if tensors else torch.device("cpu")
    found = []
    for groups, powers in totals.items():
        zero = torch.zeros((), dtype=torch.float64, device=device)
        total = torch.stack([zero, *(p.to(device) for p in powers)])
        total = total.max() if math.isinf(order) else total.sum()
        operation = dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM
        for group in groups:
            dist.all_reduce(total, op=operation, group=group)
        found.append(total)
    whole = torch.stack(found)
    return (whole.max() if math.isinf(order) else whole.sum() ** (1.0 / order)).float()


def _groups(tensor: torch.Tensor | None, layout: Layout | None) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups over which the parts of a tensor are spread."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        return tuple(
            mesh.get_group(axis)
            for axis, placement in enumerate(tensor.placements)
            if not placement.is_replicate()
        )
    if layout is not None and layout.kind == "pipelined" and layout.holders is not None:
        return (layout.holders,)
    return ()
