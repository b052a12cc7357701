"""The largest numbers only, with their places: 1 % of them is a fiftieth of the bytes.

source: Lin et al., Deep Gradient Compression, ICLR 2018: momentum correction and
warm-up. Two parts of it are left out. Local gradients are not clipped: the cell
clips the average. Momentum is not masked where it was sent: then a ratio of 1 is
plain momentum, and ratios that are not tiny keep theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.reduce.compressors.base import Feedback, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WARMUP_PASSES", "Method"]

WARMUP_PASSES = 200
"""In the first passes more is sent, from a quarter down to the ratio, geometrically. The paper
warms up for four epochs; how long an epoch is, is not known here."""
_FIRST_RATIO = 0.25
_SAMPLE = 1 << 16
"""Elements that the threshold is estimated from."""


class Method(Feedback):
    """Sends the largest `ratio` of the numbers; the others wait and grow.

    With an optimizer that has momentum, what is accumulated is not the gradient
    but the gradient with its momentum; the optimizer then steps without.
    """

    def __init__(self, layout: Layout, ratio: float) -> None:
        super().__init__(layout)
        self._ratio = ratio
        self._num_passes = 0
        self._velocity: torch.Tensor | None = None
        self._next_velocity: torch.Tensor | None = None

    def compress(self, grads: torch.Tensor) -> torch.Tensor:
        """Encode what has accumulated."""
        momentum = self.layout.momentum()
        if momentum == 0.0:
            self._next_velocity = None
            return super().compress(grads)
        if self._velocity is None:
            self._velocity = torch.zeros(self.layout.num_elements, device=self.layout.device)
        velocity = self._velocity.mul(momentum).add_(grads)
        self._next_velocity = velocity
        return super().compress(velocity)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return places (int32) and numbers (float32) of the largest, as bytes."""
        num = self.layout.num_elements
        values = values[:num]
        places = _largest(values.abs(), max(1, round(self._current_ratio() * num)))
        chosen = values[places]
        return torch.cat([places.to(torch.int32).view(torch.uint8), chosen.view(torch.uint8)])

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add the numbers at their places."""
        places, chosen = _parts(payload)
        total[places] += factor * chosen

    def settle(self, is_finite: torch.Tensor, absent: Sequence[int]) -> None:
        """Remember what waits, and its velocity."""
        super().settle(is_finite, absent)
        self._num_passes += 1
        old, new = self._velocity, self._next_velocity
        if old is None or new is None:
            return
        slices = list(self.layout.slices())
        for i in absent:
            new[slices[i]] = old[slices[i]]
        self._velocity = torch.where(is_finite, new, old)

    def rescale(self, factor: float) -> None:
        """Keep what has accumulated in the gradients' units."""
        super().rescale(factor)
        if self._velocity is not None:
            self._velocity.mul_(factor)

    def state(self) -> list[dict[str, Any]]:
        """Return residual, velocity and the passes so far."""
        entries = super().state()
        for part, entry in zip(self.layout.slices(), entries, strict=True):
            entry["num_passes"] = self._num_passes
            if self._velocity is not None:
                entry["velocity"] = self._velocity[part].clone()
        return entries

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take them over."""
        super().load(state)
        self._num_passes = max((entry.get("num_passes", 0) for entry in state), default=0)
        for part, entry in zip(self.layout.slices(), state, strict=True):
            if "velocity" in entry:
                if self._velocity is None:
                    num = self.layout.num_elements
                    self._velocity = torch.zeros(num, device=self.layout.device)
                self._velocity[part] = entry["velocity"].to(self.layout.device)

    def _current_ratio(self) -> float:
        progress = min(1.0, self._num_passes / WARMUP_PASSES)
        first = max(_FIRST_RATIO, self._ratio)
        return float(first * (self._ratio / first) ** progress)


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
