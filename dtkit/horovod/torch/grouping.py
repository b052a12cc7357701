"""Which gradients of a `DistributedOptimizer` are reduced by one collective."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from dtkit.engine.reduce.buckets import BUCKET_BYTES, first_bucket_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Named", "buckets_of"]

Named = list[tuple[str, torch.Tensor]]
"""Parameters with their names."""
_LARGE_BYTES = 4 << 20
"""To copy so much into a buffer and out of it takes longer than to agree on one tensor more."""


def buckets_of(named: Named, groups: int | Sequence[Sequence[torch.Tensor]]) -> list[Named]:
    """Lay out parameters, the last first: their gradients come first.

    Args:
        named: names and parameters.
        groups: how many groups, the groups themselves, or 0: by size.

    Raises:
        ValueError: a negative number, or a parameter in two groups.
    """
    if isinstance(groups, int):
        if groups < 0:
            msg = f"num_groups={groups}: it must not be negative"
            raise ValueError(msg)
        return _even(named[::-1], groups) if groups else _by_size(named[::-1])
    given = [list(group) for group in groups]
    names = {id(p): name for name, p in named}
    chosen = [[(names[id(p)], p) for p in group if id(p) in names] for group in given]
    seen = [id(p) for group in given for p in group]
    if len(set(seen)) != len(seen):
        msg = "groups: a parameter is in more than one group"
        raise ValueError(msg)
    rest = [(name, p) for name, p in named if id(p) not in set(seen)]
    return [group for group in chosen if group] + _by_size(rest[::-1])


def _even(named: Named, num_groups: int) -> list[Named]:
    num = min(num_groups, len(named))
    bounds = [len(named) * i // num for i in range(num + 1)] if num else []
    return [named[a:b] for a, b in pairwise(bounds)]


def _by_size(named: Named) -> list[Named]:
    """Lay small parameters together; a large one travels alone, as soon as it can, and uncopied.

    Of many, the first bucket is small: it is under way while the backward pass goes on.
    """
    most_bytes = int(os.environ.get("HOROVOD_FUSION_THRESHOLD", BUCKET_BYTES))
    small_bytes = sum(p.nbytes for _, p in named if p.nbytes < _LARGE_BYTES)
    limit = min(first_bucket_bytes(small_bytes), most_bytes)
    buckets: list[Named] = []
    small: Named = []
    num_bytes = 0
    for name, param in named:
        if param.nbytes >= _LARGE_BYTES:
            buckets.append([(name, param)])
            continue
        if not small or num_bytes >= limit or num_bytes + param.nbytes > most_bytes:
            limit = most_bytes if small else limit
            small, num_bytes = [], 0
            buckets.append(small)
        small.append((name, param))
        num_bytes += param.nbytes
    return buckets
