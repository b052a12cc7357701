"""The largest numbers only, with their places: 1 % of them is a fiftieth of the bytes.

source: Lin et al., Deep Gradient Compression, ICLR 2018; see `_momentum`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.engine.reduce.compressors._momentum import WithMomentum

if TYPE_CHECKING:
    from dtkit.engine.reduce.compressors.base import Layout

__all__ = ["Method"]

_FIRST_RATIO = 0.25
"""In the first pass; from there it goes down geometrically."""
_SAMPLE = 1 << 16
"""Elements that the threshold is estimated from."""


class Method(WithMomentum):
    """Sends the largest `ratio` of the numbers; the others wait and grow."""

    def __init__(self, layout: Layout, ratio: float) -> None:
        super().__init__(layout)
        self._ratio = ratio

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return places (int32) and numbers (float32) of the largest, as bytes."""
        num = self.layout.num_elements
        values = values[:num]
        places = _largest(values.abs(), max(1, round(self._current_ratio() * num)))
        chosen = values[places]
        values[places] = 0.0
        return torch.cat([places.to(torch.int32).view(torch.uint8), chosen.view(torch.uint8)])

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add the numbers at their places."""
        places, chosen = _parts(payload)
        total[places] += factor * chosen

    def _current_ratio(self) -> float:
        first = max(_FIRST_RATIO, self._ratio)
        return float(first * (self._ratio / first) ** self._progress)


def _parts(payload: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Copies: a rank's payload among the gathered ones need not be aligned.
    half = payload.numel() // 2
    places = payload[:half].clone().view(torch.int32)
    return places.to(torch.int64), payload[half:].clone().view(torch.float32)


def _largest(magnitudes: torch.Tensor, num: int) -> torch.Tensor:
    """Return the places of the `num` largest; NaN counts as the largest of all.

    A threshold from a sample first, that somewhat more will pass, and a true
    selection among those: to select among all takes several times as long.
    """
    total = magnitudes.numel()
    if total > 4 * _SAMPLE and num < total // 8:
        sample = magnitudes[:: total // _SAMPLE]
        wanted = min(len(sample), int(1.2 * len(sample) * num / total) + 16)
        threshold = sample.topk(wanted, sorted=False).values.amin()
        candidates = (~(magnitudes < threshold)).nonzero().squeeze(1)
        if len(candidates) >= num:
            return candidates[magnitudes[candidates].topk(num, sorted=False).indices]
    return magnitudes.topk(num, sorted=False).indices
