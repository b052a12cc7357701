"""ElasticSampler: divides a data set among the ranks there are, and knows what was processed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from dtkit.horovod.torch.basics import is_initialized, rank, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

__all__ = ["ElasticSampler"]


class ElasticSampler(Sampler[int]):
    """Yields this rank's part of the samples that no rank has processed in this epoch.

    Every rank yields as many; samples are repeated for that if need be. After each
    batch call `record_batch`, at the end of an epoch `set_epoch`.

    Args:
        dataset: anything with a length.
        shuffle: whether the order is random, by epoch.
        seed: of the order; the same on all ranks.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch: int = 0
        self.processed_indices: set[int] = set()
        self.indices: list[int] = []
        self.num_samples: int = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: nothing of it is processed."""
        self.epoch = epoch
        self.processed_indices = set()
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Note that this rank's batch of that number was processed."""
        first = batch_idx * batch_size
        self.record_indices(self.indices[first : first + batch_size])

    def record_indices(self, indices: list[int]) -> None:
        """Note that these samples were processed."""
        self.processed_indices.update(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and processed samples."""
        return {"epoch": self.epoch, "processed_indices": set(self.processed_indices)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, and divide what is left anew."""
        self.epoch = state_dict["epoch"]
        self.processed_indices = set(state_dict["processed_indices"])
        self.reset()

    def reset(self) -> None:
        """Divide what is left among the ranks there are now."""
        me, num_ranks = (rank(), size()) if is_initialized() else (0, 1)
        left = [i for i in self._order() if i not in self.processed_indices]
        self.num_samples = -(-len(left) // num_ranks)
        total = self.num_samples * num_ranks
        while left and len(left) < total:
            left += left[: total - len(left)]
        self.indices = left[me:total:num_ranks]

    def __iter__(self) -> Iterator[int]:
        return iter(list(self.indices))

    def __len__(self) -> int:
        return self.num_samples

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()
