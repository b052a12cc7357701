"""Eight bits a number, with a scale for each 1024: a quarter of the bytes."""

from __future__ import annotations

import torch

from dtkit.engine.reduce.compressors._chunks import joined, largest, scales_of
from dtkit.engine.reduce.compressors.base import Feedback

__all__ = ["Method"]

_CHUNK = 1024
_TOP = 127


class Method(Feedback):
    """Rounds to 255 levels between minus and plus the largest number of a chunk.

    A number that is not finite makes the scale not finite, and so its whole chunk.
    """

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return scales and levels."""
        chunks = values.view(-1, _CHUNK)
        scales = largest(chunks).div_(_TOP)
        # A chunk of zeros: 0 / tiny is 0.
        levels = chunks.div(scales.clamp_min(torch.finfo(scales.dtype).tiny).unsqueeze(1))
        return joined(scales, levels.round_().nan_to_num_(0.0).to(torch.int8))

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add levels times scales."""
        chunks = total.view(-1, _CHUNK)
        scales, codes = scales_of(payload, len(chunks))
        chunks.add_(codes.view(torch.int8).view(-1, _CHUNK).mul(scales), alpha=factor)
