"""One bit a number, with a scale for each 256: a twenty-eighth of the bytes."""

from __future__ import annotations

import torch

from dtkit.engine.reduce.compressors._chunks import joined, packed, scales_of, unpacked
from dtkit.engine.reduce.compressors.base import Feedback

__all__ = ["Method"]

_CHUNK = 256


class Method(Feedback):
    """Sends each number's sign, and the mean magnitude of its chunk.

    source: Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019 (algorithm 2),
    with a scale for each chunk in place of one for each tensor.
    """

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return scales and signs, eight to a byte."""
        scales = torch.linalg.vector_norm(values.view(-1, _CHUNK), 1, dim=1).div_(_CHUNK)
        return joined(scales, packed(values.ge(0).view(torch.uint8), 1))

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add signs times scales."""
        chunks = total.view(-1, _CHUNK)
        scales, codes = scales_of(payload, len(chunks))
        signs = unpacked(codes, 1).to(torch.float32).mul_(2.0).sub_(1.0)
        chunks.add_(signs.view(-1, _CHUNK).mul_(scales), alpha=factor)
