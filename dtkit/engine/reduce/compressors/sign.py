"""One bit a number, with a scale for each 256: a twenty-eighth of the bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dtkit.engine.reduce.compressors import int8
from dtkit.engine.reduce.compressors._chunks import joined, packed, scales_of, unpacked
from dtkit.engine.reduce.compressors._momentum import WithMomentum

if TYPE_CHECKING:
    from dtkit.engine.reduce.compressors.base import Layout

__all__ = ["Method"]

_CHUNK = 256


class Method(WithMomentum):
    """Sends each number's sign, and the mean magnitude of its chunk.

    source: Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019 (algorithm 2),
    with a scale for each chunk in place of one for each tensor; and Tang et al., 1-bit Adam,
    ICML 2021, that one bit does for a gradient with its momentum, after a warm-up. Here that
    has 8 bits.
    """

    is_segmented = True

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._fine = int8.Method(replace(layout, shapes=()))
        """For its code; it remembers nothing."""

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return scales and signs, eight to a byte."""
        if self._progress < 1.0:
            return self._fine.encode(values)
        chunks = values.view(-1, _CHUNK)
        scales = chunks.abs().mean(1)
        signs = values.ge(0).view(torch.uint8)
        chunks.sub_(_signs(signs).mul_(scales.unsqueeze(1)))
        return joined(scales, packed(signs, 1))

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add signs times scales."""
        if self._progress < 1.0:
            self._fine.add(payload, total, factor)
            return
        chunks = total.view(-1, _CHUNK)
        scales, codes = scales_of(payload, len(chunks))
        chunks.add_(_signs(unpacked(codes, 1)).mul_(scales), alpha=factor)


def _signs(bits: torch.Tensor) -> torch.Tensor:
    """Return 1.0 for each bit (uint8) that is set and -1.0 for each other, in chunks."""
    return bits.to(torch.float32).mul_(2.0).sub_(1.0).view(-1, _CHUNK)
