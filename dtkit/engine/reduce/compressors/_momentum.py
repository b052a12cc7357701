"""Momentum before compression, and a warm-up, for methods that send little of a gradient at once.

source: Lin et al., Deep Gradient Compression, ICLR 2018. Two parts of it are left out. Local
gradients are not clipped: the cell clips the average. Momentum is not masked where it was sent:
then a ratio of 1 is plain momentum, and ratios that are not tiny keep theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.reduce.compressors.base import Feedback, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["WARMUP_PASSES", "WithMomentum"]

WARMUP_PASSES = 200
"""In the first passes more is sent. The paper warms up for four epochs; how long an epoch is, is
not known here."""


class WithMomentum(Feedback):
    """Compresses not the gradient but the gradient with its momentum; the optimizer has none then.

    What compression holds back reaches the optimizer late, and its momentum would make more of
    that than there is.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._num_passes = 0
        self._velocity: torch.Tensor | None = None
        self._next_velocity: torch.Tensor | None = None

    def compress(self, grads: torch.Tensor) -> Iterator[torch.Tensor]:
        """Encode what has accumulated."""
        momentum = self.layout.momentum()
        if momentum.factor == 0.0:
            self._next_velocity = None
            return super().compress(grads)
        if self._velocity is None:
            self._velocity = self._zeros()
        velocity = self._velocity.mul(momentum.factor).add_(grads)
        self._next_velocity = velocity
        if momentum.is_nesterov:
            return super().compress(grads.add(velocity, alpha=momentum.factor))
        return super().compress(velocity)

    def settle(self, is_finite: torch.Tensor, absent: Sequence[int]) -> None:
        """Remember the velocity too, and count."""
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
        entries = [entry | {"num_passes": self._num_passes} for entry in super().state()]
        if self._velocity is not None:
            for part, entry in zip(self.layout.slices(), entries, strict=True):
                entry["velocity"] = self._velocity[part].clone()
        return entries

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take them over."""
        super().load(state)
        self._num_passes = max((entry.get("num_passes", 0) for entry in state), default=0)
        for part, entry in zip(self.layout.slices(), state, strict=True):
            if "velocity" in entry:
                if self._velocity is None:
                    self._velocity = self._zeros()
                self._velocity[part] = entry["velocity"].to(self.layout.device)

    @property
    def _progress(self) -> float:
        """How far the warm-up is, from 0 to 1."""
        return min(1.0, self._num_passes / WARMUP_PASSES)

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self.layout.num_elements, device=self.layout.device)
