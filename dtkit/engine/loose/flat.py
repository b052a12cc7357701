"""Flat: the weights of a replica as one vector, so that they travel in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Flat"]


class Flat:
    """Tensors seen as one vector of float32, or of float64 if one of them is.

    Args:
        tensors: floating point.
        device: where the vector is; None: where the first tensor is.
        num_extra: elements after the tensors' own.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        device: torch.device | None = None,
        num_extra: int = 0,
    ) -> None:
        self.tensors: tuple[torch.Tensor, ...] = tuple(tensors)
        is_wide = any(t.dtype == torch.float64 for t in tensors)
        self.dtype: torch.dtype = torch.float64 if is_wide else torch.float32
        self.num_values: int = sum(t.numel() for t in tensors)
        self.vector: torch.Tensor = torch.zeros(
            self.num_values + num_extra, dtype=self.dtype, device=device or tensors[0].device
        )
        self._views = self._cut(self.vector)

    @property
    def values(self) -> torch.Tensor:
        """The part of the vector that is the tensors'."""
        return self.vector[: self.num_values]

    @property
    def extra(self) -> torch.Tensor:
        """The part of the vector after that."""
        return self.vector[self.num_values :]

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """Copy the tensors into the vector; returns `values`."""
        # .data: what autograd has recorded of the parameters is not concerned.
        for view, tensor in zip(self._views, self.tensors, strict=True):
            view.copy_(tensor.data)
        return self.values

    @torch.no_grad()
    def write(self) -> None:
        """Copy the vector into the tensors."""
        for view, tensor in zip(self._views, self.tensors, strict=True):
            tensor.data.copy_(view)

    def _cut(self, vector: torch.Tensor) -> list[torch.Tensor]:
        sizes = [t.numel() for t in self.tensors]
        pieces = vector[: self.num_values].split(sizes)
        return [piece.view(t.shape) for piece, t in zip(pieces, self.tensors, strict=True)]
