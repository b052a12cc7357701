"""What several ranks hold alike is made equal again when some of them lack a step.

A rank that failed before a step has weights from before it, and so have the copies in which it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtkit.engine.living import living
from dtkit.engine.parallel.norms import own_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from dtkit.engine.parallel.layout import Layout

__all__ = ["level"]

Tensors = list[tuple[torch.Tensor, bool]]
"""Each with whether it is the same on the ranks that hold the model together."""


@torch.no_grad()
def level(model: nn.Module, layout: Layout, steps: Sequence[int]) -> list[int]:
    """Give ranks that are behind what others have of the same; a collective.

    Args:
        model: that is laid out.
        layout: of it, with the groups that there are now.
        steps: how many steps each rank has made with it.

    Returns:
        The ranks whose part stays behind, since nobody else has it.
    """
    if len(set(steps)) == 1:
        return []
    rows = layout.mesh.mesh.reshape(-1, layout.mesh.mesh.shape[-1]).tolist()
    columns = list(zip(*rows, strict=True))
    best = {rank: max(column, key=lambda r: steps[r]) for column in columns for rank in column}
    reached = {rank: steps[source] for rank, source in best.items()}
    tensors = list(_tensors(model, layout))
    if not _are_alike(tensors, rows, columns):
        return [rank for rank, step in enumerate(steps) if step < max(steps)]
    row = next(row for row in rows if dist.get_rank() in row)
    for tensor, is_same_in_row in tensors:
        if len(rows) > 1:
            _broadcast(tensor, best[dist.get_rank()], layout.mesh.get_group(0))
        if is_same_in_row and len(row) > 1:
            source = max(row, key=lambda r: reached[r])
            _broadcast(tensor, source, layout.mesh.get_group(layout.mesh.ndim - 1))
    return sorted(rank for rank, step in reached.items() if step < max(steps))


def _tensors(model: nn.Module, layout: Layout) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield what is here of weights, buffers and the optimizers' state."""
    params = list(model.parameters())
    own = {id(param) for param in params}
    optimizers = living(Optimizer)
    optimizers = [
        o for o in optimizers if own & {id(p) for g in o.param_groups for p in g["params"]}
    ]
    for tensor in [*params, *model.buffers()]:
        is_same = _is_same_in_row(tensor, layout)
        if not tensor.is_meta:
            yield own_part(tensor), is_same
        for optimizer in optimizers:
            state: dict[str, Any] = optimizer.state.get(tensor, {})
            for name in sorted(state):
                if isinstance(state[name], torch.Tensor):
                    yield own_part(state[name]), is_same


def _is_same_in_row(tensor: torch.Tensor, layout: Layout) -> bool:
    if isinstance(tensor, DTensor):
        return tensor.placements[-1].is_replicate()
    return layout.kind != "pipelined"


def _are_alike(tensors: Tensors, rows: Any, columns: Any) -> bool:
    """Return whether all ranks have the same tensors where they are to be the same."""
    mine = [(tuple(t.shape), str(t.dtype), is_same) for t, is_same in tensors]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return all(found[rank] == found[column[0]] for column in columns for rank in column) and all(
        [t for t in found[rank] if t[2]] == [t for t in found[row[0]] if t[2]]
        for row in rows
        for rank in row
    )


def _broadcast(tensor: torch.Tensor, source: int, group: dist.ProcessGroup) -> None:
    if not tensor.numel():
        return
    sent = tensor.contiguous()
    dist.broadcast(sent, source, group=group)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.copy_(sent)
