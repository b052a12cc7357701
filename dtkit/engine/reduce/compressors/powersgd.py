"""Low-rank gradients: a matrix is sent as one of the two factors that approximate it.

source: Vogels et al., PowerSGD, NeurIPS 2019, in the alternating form of Zhang et
al., ACP-SGD, ICDCS 2023: each pass sends one factor and keeps the other, so there
is one collective where PowerSGD has two that wait for each other, and half the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.reduce.compressors.base import Feedback, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Method"]


class Method(Feedback):
    """Sends each matrix's left factor in one pass and its right one in the next.

    What is no matrix, or as small as its factors, is sent as it is. All ranks hold
    the same factors: they start from the same numbers and orthonormalize the same
    averages, on machines of one kind.
    """

    is_summed = True

    def __init__(self, layout: Layout, rank: float) -> None:
        super().__init__(layout)
        self._slices = list(layout.slices())
        self._bases: dict[int, torch.Tensor] = {}
        self._flipped: set[int] = set()
        self._factors: dict[int, torch.Tensor] = {}
        self._whole: list[int] = []
        for i, shape in enumerate(layout.shapes):
            num_rows = shape[0] if len(shape) > 1 else 1
            num_columns = shape.numel() // max(num_rows, 1)
            width = min(int(rank), num_rows, num_columns)
            if width * (num_rows + num_columns) >= shape.numel():
                self._whole.append(i)
            else:
                seed = torch.Generator().manual_seed(num_rows * 1_000_003 + num_columns)
                start = torch.randn((num_columns, width), generator=seed)
                self._bases[i] = torch.linalg.qr(start).Q.to(layout.device)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return what is sent as it is, and the factors of this pass."""
        parts = [values[self._slices[i]] for i in self._whole]
        parts += [(self._matrix(values, i) @ basis).view(-1) for i, basis in self._bases.items()]
        payload = torch.cat(parts)
        self.add(payload, values, -1.0)
        return payload

    def add(self, payload: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """Add the products of factors and bases."""
        start = 0
        for i in self._whole:
            part = total[self._slices[i]]
            part.add_(payload[start : start + part.numel()], alpha=factor)
            start += part.numel()
        for i, basis in self._bases.items():
            matrix = self._matrix(total, i)
            num = len(matrix) * basis.shape[1]
            self._factors[i] = payload[start : start + num].view(len(matrix), -1)
            matrix.addmm_(self._factors[i], basis.t(), alpha=factor)
            start += num

    def settle(self, is_finite: torch.Tensor, absent: Sequence[int]) -> None:
        """Take the average's factors, which `add` saw last, as the next pass's bases."""
        super().settle(is_finite, absent)
        if is_finite:  # the same on every rank
            for i in self._bases.keys() - set(absent):
                self._bases[i] = torch.linalg.qr(self._factors[i]).Q
                self._flipped ^= {i}

    def state(self) -> list[dict[str, Any]]:
        """Return residual and basis."""
        entries = super().state()
        for i, basis in self._bases.items():
            entries[i] |= {"basis": basis.clone(), "is_flipped": i in self._flipped}
        return entries

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take them over."""
        super().load(state)
        for i, entry in enumerate(state):
            if i in self._bases and "basis" in entry:
                self._bases[i] = entry["basis"].to(self.layout.device)
                if entry["is_flipped"]:
                    self._flipped.add(i)

    def _matrix(self, values: torch.Tensor, i: int) -> torch.Tensor:
        """Return a view of a parameter's numbers as a matrix, transposed every other pass."""
        matrix = values[self._slices[i]].view(self.layout.shapes[i][0], -1)
        return matrix.t() if i in self._flipped else matrix
