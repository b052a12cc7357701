"""Compressor: what makes one bucket's gradients small, and remembers what was left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["IN_GRADIENT_UNITS", "Compressor", "Feedback", "Layout", "Momentum", "rehearse"]

PADDING = 1024
"""Elements that the buffers of `Feedback` are a multiple of: bits and chunks come out even."""
SEGMENT = 1 << 19
"""Elements in a piece, for methods that may send a bucket in pieces, on CPU. In 8 bits each they
are half a megabyte: gloo gathers such messages as fast as a slow link allows, and ones of 8 MB at
60 to 80 % of that (two ranks, 100 Mbit/s). They stay in the cache from operation to operation."""

IN_GRADIENT_UNITS = frozenset({"residual", "velocity"})
"""What of a compressor's state follows the gradients' scale."""


class Momentum(NamedTuple):
    """SGD's momentum of some parameters.

    Attributes:
        factor: what it keeps from step to step; 0: there is none.
        is_nesterov: whether a step looks ahead by it.
    """

    factor: float = 0.0
    is_nesterov: bool = False


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
    momentum: Callable[[], Momentum] = Momentum

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
    """Compresses the gradients of one bucket, which one collective or a few then carry.

    A pass calls `compress`, then `average` with what the collectives brought. All
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
    def compress(self, grads: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield what this rank sends, in pieces: one-dimensional, as long on every rank.

        Each may be under way while the next is made.

        Args:
            grads: (num_elements,) of the layout's dtype; left as they are.
        """

    @abstractmethod
    def average(
        self, payloads: Iterable[torch.Tensor], out: torch.Tensor, absent: Sequence[int]
    ) -> None:
        """Write the average over ranks to `out`.

        Args:
            payloads: of each piece (world_size, size) in the order of ranks, or (1, size):
                their sum.
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

    Attributes:
        is_segmented: whether it may be given a part of the bucket at a time.
    """

    is_segmented: ClassVar[bool] = False

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        num_padded = -(-layout.num_elements // PADDING) * PADDING
        # `_next` is what the residual will be if this pass turns out finite. The two
        # change places then, so a pass allocates nothing of the gradients' size.
        self._residual, self._next = (
            torch.zeros(num_padded, device=layout.device) for _ in range(2)
        )
        # A device computes and sends a whole bucket faster than its parts.
        is_cut = self.is_segmented and layout.device.type == "cpu"
        size = min(SEGMENT, num_padded) if is_cut else num_padded
        starts = range(0, num_padded, size) if size else [0]
        self._segments = [slice(start, min(start + size, num_padded)) for start in starts]
        self._total = torch.zeros(size, device=layout.device)

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the payload of these values, and leave in them what it does not stand for."""

    @abstractmethod
    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add to `total` `factor` times the values that a payload stands for."""

    def compress(self, grads: torch.Tensor) -> Iterator[torch.Tensor]:
        """Encode gradients and residual; what the code leaves out is the next residual."""
        num = self.layout.num_elements
        for part in self._segments:
            values, mine = self._next[part], grads[part]
            torch.add(self._residual[part][: len(mine)], mine, out=values[: len(mine)])
            values[max(num - part.start, 0) :] = 0.0
            yield self.encode(values)

    def average(
        self, payloads: Iterable[torch.Tensor], out: torch.Tensor, absent: Sequence[int]
    ) -> None:
        """Add up what the ranks sent, in their order."""
        is_finite = torch.ones((), dtype=torch.bool, device=self.layout.device)
        for part, received in zip(self._segments, payloads, strict=True):
            total = self._total[: part.stop - part.start].zero_()
            for payload in received:
                self.add(payload, total, 1.0 / self.layout.world_size)
            target = out[part]
            target.copy_(total[: len(target)])
            is_finite &= torch.dot(total, total).isfinite()
        self.settle(is_finite, absent)

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


def rehearse(compressor: Compressor, grads: torch.Tensor, out: torch.Tensor) -> None:
    """Do all that a pass computes, as if every rank had sent the same: to measure it."""
    num = 1 if compressor.is_summed else compressor.layout.world_size
    payloads = [payload.expand(num, -1) for payload in compressor.compress(grads)]
    compressor.average(payloads, out, ())
