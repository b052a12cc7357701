"""Weights on the ranks: sent from rank 0, and compared without being sent."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["are_alike", "broadcast", "checksums", "digest", "equalize", "has_data"]

_SAMPLE = 1 << 16
"""Elements of a tensor that its checksum looks at: weights that part do so everywhere."""


def are_alike(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> bool:
    """Return whether these are as many on every rank, of the same shapes and dtypes, and there."""
    layout = ";".join(
        "lazy" if is_lazy(t) else f"{tuple(t.shape)}{t.dtype}{has_data(t):d}" for t in tensors
    )
    digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
    bounds = torch.tensor([digest, -digest])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    return int(bounds[0]) == digest == -int(bounds[1])


@torch.no_grad()
def broadcast(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup, source: int = 0) -> None:
    """Overwrite the tensors with those of one rank of the group, by default the first."""
    pending = []
    for tensor in tensors:
        if has_data(tensor):
            # Not the parameter itself: this change is no business of autograd's.
            whole = tensor.data.contiguous()
            # As bytes, since gloo does not know every dtype.
            flat = whole.reshape(-1).view(torch.uint8)
            work = dist.broadcast(flat, group=group, group_src=source, async_op=True)
            pending.append((work, tensor.data, whole))
    for work, target, whole in pending:
        work.wait()
        if whole.data_ptr() != target.data_ptr():  # it was not contiguous
            target.copy_(whole)


def equalize(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup, source: int = 0) -> None:
    """Make the tensors equal on all ranks, sending only those that differ."""
    mine = torch.tensor(checksums(tensors), dtype=torch.int64)
    bounds = torch.stack([mine, -mine])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    differs = (bounds[0] != -bounds[1]).tolist()
    broadcast([t for t, is_other in zip(tensors, differs, strict=True) if is_other], group, source)


def checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return a number per tensor; equal weights have equal numbers."""
    return [_checksum(t) if has_data(t) else 0 for t in tensors]


def digest(tensor: torch.Tensor) -> int:
    """Return a number that tells a tensor's bytes, every one of them, from others'."""
    whole = tensor.detach().contiguous().cpu().reshape(-1)
    head = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
    return zlib.crc32(whole.view(torch.uint8).numpy().data, zlib.crc32(head))


def _checksum(tensor: torch.Tensor) -> int:
    flat = tensor.data.reshape(-1)
    sample = flat[:: -(-flat.numel() // _SAMPLE)].contiguous().cpu()
    return zlib.crc32(sample.view(torch.uint8).numpy().tobytes())


def has_data(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has memory of its own that can be written to."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    # An expanded tensor has no memory of its own to be written to.
    is_expanded = any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return tensor.numel() > 0 and not is_expanded
