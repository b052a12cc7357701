"""Gradients sent in a narrower floating-point type, and added up in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dtkit.engine.reduce.compressors.base import Compressor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

__all__ = ["Casting"]


class Casting(Compressor):
    """Sends `wire_dtype`. What was rounded away is not remembered: it is unbiased enough."""

    is_summed = True
    wire_dtype: ClassVar[torch.dtype]

    def compress(self, grads: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the gradients in the narrower type."""
        # Divided first: the type may not hold the sum.
        yield grads.div(self.layout.world_size).to(self.wire_dtype)

    def average(
        self, payloads: Iterable[torch.Tensor], out: torch.Tensor, absent: Sequence[int]
    ) -> None:
        """Widen the sum."""
        del absent  # nothing is remembered
        (payload,) = payloads
        out.copy_(payload[0])
