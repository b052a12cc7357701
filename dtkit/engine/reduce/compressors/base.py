"""Compressor: what makes one bucket's gradients small, and remembers what was left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["IN_GRADIENT_UNITS", "Compressor", "Feedback", "Layout"]

PADDING = 1024
"""Elements that the buffers of `Feedback` are a multiple of: bits and chunks come out even."""


IN_GRADIENT_UNITS = frozenset({"residual", "velocity"})
"""What of a compressor's state follows the gradients' scale."""


def _no_momentum() -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """One bucket's gradients, laid end to end.

    Attributes:
        shapes: of the parameters.
        dtype: of the gradients.
        device: where they are.
        world_size: over how many ranks they are averaged.
        momentum: returns the momentum of their optimizer, for methods that apply it
            before they compress.
    """

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    world_size: int
    momentum: Callable[[], float] = _no_momentum

    @property
    def num_elements(self) -> int:
        """How many numbers the gradients are."""
        return sum(shape.numel() for shape in self.shapes)

    def slices(self) -> Iterator[slice]:
        """Yield where each parameter's gradient is."""
        start = 0
        for shape in self.shapes:
            yield slice(start, start + shape.numel())
            start += shape.numel()


class Compressor(ABC):
    """Compresses the gradients of one bucket, which one collective then carries.

    A pass calls `compress`, then `average` with what the collective brought. All
    ranks average the same bytes in the same order, so they end bit-equal. What
    is not finite on one rank is not finite on any rank afterwards; what a
    compressor remembers is then left as it was, as if the pass had not been.

    Attributes:
        is_summed: whether payloads can be added up on their way, by an all-reduce;
            else every rank gets the payloads of all, by an all-gather.
    """

    is_summed: ClassVar[bool] = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def compress(self, grads: torch.Tensor) -> torch.Tensor:
        """Return what this rank sends: one-dimensional, as long on every rank.

        Args:
            grads: (num_elements,) of the layout's dtype; left as they are.
        """

    @abstractmethod
    def average(self, payloads: torch.Tensor, out: torch.Tensor, absent: Sequence[int]) -> None:
        """Write the average over ranks to `out`.

        Args:
            payloads: (world_size, size) in the order of ranks, or (1, size): their sum.
            out: (num_elements,) of the layout's dtype.
            absent: parameters for which no rank had a gradient: as if not sent.
        """

    def rescale(self, factor: float) -> None:
        """Multiply what is remembered: the gradients' scale has changed by this factor."""
        del factor  # nothing is remembered, unless a method does

    def state(self) -> list[dict[str, Any]]:
        """Return what is remembered, for each parameter; copies."""
        return [{} for _ in self.layout.shapes]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over what another compressor of this method remembered of each parameter."""
        del state


class Feedback(Compressor):
    """Error feedback: what compression left out of a gradient is added to the next one.

    A method gives `encode` and `add`; they see float32, padded with zeros to a
    multiple of `PADDING`. source: Karimireddy et al., Error Feedback Fixes SignSGD,
    ICML 2019.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        num_padded = -(-layout.num_elements // PADDING) * PADDING
        # `_next` is what the residual will be if this pass turns out finite. The two
        # change places then, so a pass allocates nothing of the gradients' size.
        self._residual, self._next, self._total = (
            torch.zeros(num_padded, device=layout.device) for _ in range(3)
        )

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the payload of these values."""

    @abstractmethod
    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add to `total` `factor` times the values that a payload stands for."""

    def compress(self, grads: torch.Tensor) -> torch.Tensor:
        """Encode gradients and residual; what the code leaves out is the next residual."""
        num, values = self.layout.num_elements, self._next
        torch.add(self._residual[:num], grads, out=values[:num])
        values[num:] = 0.0
        payload = self.encode(values)
        self.add(payload, values, -1.0)
        return payload

    def average(self, payloads: torch.Tensor, out: torch.Tensor, absent: Sequence[int]) -> None:
        """Add up what the ranks sent, in their order."""
        self._total.zero_()
        for payload in payloads:
            self.add(payload, self._total, 1.0 / self.layout.world_size)
        total = self._total[: self.layout.num_elements]
        out.copy_(total)
        self.settle(torch.dot(total, total).isfinite(), absent)

    def settle(self, is_finite: torch.Tensor, absent: Sequence[int]) -> None:
        """Remember what this pass left out, unless it is void."""
        slices = list(self.layout.slices())
        for i in absent:
            self._next[slices[i]] = self._residual[slices[i]]
        if not is_finite.is_cpu:  # no question to the device, which would wait for it
            self._residual = torch.where(is_finite, self._next, self._residual)
        elif is_finite:
            self._residual, self._next = self._next, self._residual

    def rescale(self, factor: float) -> None:
        """Keep the residual in the gradients' units."""
        self._residual.mul_(factor)

    def state(self) -> list[dict[str, Any]]:
        """Return the residual of each parameter."""
        return [{"residual": self._residual[part].clone()} for part in self.layout.slices()]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over the residuals."""
        for part, entry in zip(self.layout.slices(), state, strict=True):
            if "residual" in entry:
                self._residual[part] = entry["residual"].to(self.layout.device)
