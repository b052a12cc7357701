"""Numbers rounded to a few levels between minus and plus the largest of their chunk."""

from __future__ import annotations

from typing import ClassVar

import torch

from dtkit.engine.reduce.compressors._chunks import joined, largest, packed, scales_of, unpacked
from dtkit.engine.reduce.compressors.base import Feedback

__all__ = ["Quantizing"]


class Quantizing(Feedback):
    """Sends `num_bits` a number, and a scale for each `chunk` of them.

    A number that is not finite makes the scale not finite, and so its whole chunk.
    """

    is_segmented = True
    num_bits: ClassVar[int]
    chunk: ClassVar[int]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return scales and levels."""
        chunks = values.view(-1, self.chunk)
        scales = largest(chunks).div_(self._top)
        # A chunk of zeros: 0 times whatever is finite is 0.
        factors = scales.clamp_min(torch.finfo(scales.dtype).tiny).reciprocal_()
        levels = chunks.mul(factors.unsqueeze(1)).round_().nan_to_num_(0.0)
        chunks.addcmul_(levels, scales.unsqueeze(1), value=-1.0)
        return joined(scales, self._codes(levels))

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add levels times scales."""
        chunks = total.view(-1, self.chunk)
        scales, codes = scales_of(payload, len(chunks))
        chunks.add_(self._levels(codes).view(-1, self.chunk) * scales, alpha=factor)

    @property
    def _top(self) -> int:
        """The highest level: as many lie below zero as above."""
        return (1 << (self.num_bits - 1)) - 1

    def _codes(self, levels: torch.Tensor) -> torch.Tensor:
        if self.num_bits == 8:  # noqa: PLR2004  whole bytes: nothing to pack
            return levels.to(torch.int8)
        return packed(levels.add_(self._top).to(torch.uint8), self.num_bits)

    def _levels(self, codes: torch.Tensor) -> torch.Tensor:
        if self.num_bits == 8:  # noqa: PLR2004
            return codes.view(torch.int8)
        return unpacked(codes, self.num_bits).to(torch.float32).sub_(self._top)
