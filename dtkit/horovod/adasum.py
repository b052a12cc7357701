"""Adasum: gradients added as far as they point in different directions.

source: Maleki et al., "Scaling Distributed Training with Adaptive Summation",
arXiv 2006.02924, equation of the pairwise operator and its recursion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["adasum"]


def adasum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Combine as many tensors as a power of two, neighbours first.

    Two that are orthogonal are added, two that are parallel are averaged. Every
    rank computes this from the same tensors, and so gets the same bits.
    """
    level = [t.to(_wide(t.dtype)) for t in tensors]
    while len(level) > 1:
        level = [_pair(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0].to(tensors[0].dtype)


def _pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dot, aa, bb = (a * b).sum(), (a * a).sum(), (b * b).sum()
    # A zero tensor adds nothing, and has no direction to divide by.
    one = torch.ones_like(dot)
    weight_a = torch.where(aa > 0, 1 - dot / (2 * aa), one)
    weight_b = torch.where(bb > 0, 1 - dot / (2 * bb), one)
    return weight_a * a + weight_b * b


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
