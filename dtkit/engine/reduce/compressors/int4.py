"""Four bits a number, with a scale for each 256: an eighth of the bytes."""

from __future__ import annotations

import torch

from dtkit.engine.reduce.compressors._chunks import joined, largest, packed, scales_of, unpacked
from dtkit.engine.reduce.compressors.base import Feedback

__all__ = ["Method"]

_CHUNK = 256
_TOP = 7


class Method(Feedback):
    """Rounds to 15 levels between minus and plus the largest number of a chunk.

    A number that is not finite makes the scale not finite, and so its whole chunk.
    """

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return scales and levels, two to a byte."""
        chunks = values.view(-1, _CHUNK)
        scales = largest(chunks).div_(_TOP)
        levels = chunks.div(scales.clamp_min(torch.finfo(scales.dtype).tiny).unsqueeze(1))
        codes = levels.round_().nan_to_num_(0.0).add_(_TOP).to(torch.uint8)
        return joined(scales, packed(codes, 4))

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add levels times scales."""
        chunks = total.view(-1, _CHUNK)
        scales, codes = scales_of(payload, len(chunks))
        levels = unpacked(codes, 4).to(torch.float32).sub_(_TOP)
        chunks.add_(levels.view(-1, _CHUNK).mul_(scales), alpha=factor)
