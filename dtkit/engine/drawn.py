"""Drawn: which samples of a data set a rank has drawn in a pass over a divided loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Drawn"]


class Drawn:
    """Counts how often each sample was drawn, up to 255 times; one byte each.

    Attributes:
        counts: (num_samples,) uint8.
        is_whole: whether the pass has come to its end.

    Args:
        num_samples: of the data set.
    """

    def __init__(self, num_samples: int) -> None:
        self.counts: NDArray[np.uint8] = np.zeros(num_samples, dtype=np.uint8)
        self.is_whole = False

    def add(self, indices: Sequence[Any]) -> None:
        """Count a batch; what is no index of the data set is not counted."""
        found = np.asarray(indices)
        if found.dtype.kind in "iu" and found.size and found.min() >= 0:
            np.add.at(self.counts, found[found < len(self.counts)], 1)
