"""Sparse gradients: rows are gathered, not added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.engine.reduce.wire import gather, num_gathered_bytes

if TYPE_CHECKING:
    from dtkit.engine.reduce.wire import Wire

__all__ = ["average_sparse"]


def average_sparse(param: torch.Tensor, wire: Wire) -> None:
    """Average a sparse gradient; it stays None if no rank has one.

    By gathering, which every backend can do; NCCL has no sparse all-reduce.
    """
    group, world_size = wire.group, wire.group.size()
    grad = None if param.grad is None else param.grad.coalesce()
    num_rows = -1 if grad is None else int(grad.indices().shape[1])
    mine = torch.tensor([num_rows], device=param.device)
    counts = torch.empty(world_size, dtype=mine.dtype, device=param.device)
    gather(counts, mine, group=group)
    most = int(counts.max())
    if most < 0:
        return
    rows = torch.zeros(most, dtype=torch.int64, device=param.device)
    values = torch.zeros((most, *param.shape[1:]), dtype=param.dtype, device=param.device)
    if grad is not None:
        rows[:num_rows], values[:num_rows] = grad.indices()[0], grad.values()
    all_rows = rows.new_empty((world_size * most,))
    all_values = values.new_empty((world_size * most, *values.shape[1:]))
    gather(all_rows, rows, group=group)
    gather(all_values, values, group=group)
    num_bytes = num_gathered_bytes(
        sum(t.numel() * t.element_size() for t in (mine, rows, values)), world_size
    )
    wire.on_sent(num_bytes, num_bytes)
    real = torch.cat([
        torch.arange(max(num, 0), device=param.device) + rank * most
        for rank, num in enumerate(counts.tolist())
    ])  # fmt: skip
    total = torch.sparse_coo_tensor(
        all_rows[real].unsqueeze(0), all_values[real] / world_size, param.shape
    )
    param.grad = total.coalesce()
