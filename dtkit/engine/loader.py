"""DataLoaders in a run: waits are timed, and one that shuffles is divided among the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Share", "ShardedLoaders", "TimedBatches", "num_samples"]

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

# Any, below: datasets and batches are the user's own.


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's part of one global batch.

    Attributes:
        indices: the samples to load; never empty, see `weight`.
        num_samples: how many of them count (0: the batch was smaller than the
            number of ranks, and this rank loads one sample for nothing).
        weight: what the rank's mean gradient must be multiplied with so that
            the average over ranks is the mean over the global batch.
    """

    indices: list[int]
    num_samples: int
    weight: float


def split(batch: list[int], rank: int, world_size: int) -> Share:
    """Return `rank`'s share of a global batch; shares differ by one sample at most."""
    size, extra = divmod(len(batch), world_size)
    start = rank * size + min(rank, extra)
    mine = batch[start : start + size + (rank < extra)]
    weight = len(mine) * world_size / len(batch)
    return Share(mine or batch[:1], len(mine), weight)


def merge(batches: Iterable[list[int]], num: int, *, drop_last: bool) -> Iterator[list[int]]:
    """Join every `num` batches into a global one; with `drop_last` an incomplete one goes."""
    joined: list[int] = []
    count = 0
    for batch in batches:
        joined += batch
        count += 1
        if count == num:
            yield joined
            joined, count = [], 0
    if joined and not drop_last:
        yield joined


class _Shares:
    """A batch sampler: the written one's batches, this rank's share of each.

    Rank 0 draws the order, from the user's own sampler and exactly when it
    would have been drawn on one device, and sends it to the others. So one
    device and N ranks see the same global batches, whatever the sampler is and
    whether or not the cell sets a seed.
    """

    def __init__(
        self, written: Iterable[list[int]], group: dist.ProcessGroup, *, is_global: bool,
        drop_last: bool,
    ) -> None:  # fmt: skip
        self._written = written
        self._group = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._num_merged = 1 if is_global else self._world_size
        self._drop_last = drop_last
        self.shares: list[Share] = []

    def __iter__(self) -> Iterator[list[int]]:
        order: list[Any] = [list(self._written) if self._rank == 0 else None]
        dist.broadcast_object_list(
            order, group=self._group, group_src=0, device=torch.device("cpu")
        )
        batches = merge(order[0], self._num_merged, drop_last=self._drop_last)
        self.shares = [split(batch, self._rank, self._world_size) for batch in batches]
        # A generator, like BatchSampler's own: torch draws the workers' base seed
        # after iter() and before the first batch, and the order comes after it.
        for share in self.shares:
            yield share.indices

    def __len__(self) -> int:
        num = len(self._written)  # type: ignore[arg-type]  a batch sampler has a length
        rounded = num // self._num_merged
        return rounded if self._drop_last or num % self._num_merged == 0 else rounded + 1


class ShardedLoaders:
    """Makes and remembers the divided twin of each DataLoader that shuffles.

    Args:
        group: the ranks among whom the data is divided.
        is_global: whether the written batch size is that of all ranks together.
        note: takes a line for the user.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, is_global: bool, note: Callable[[str], None]
    ) -> None:
        self._group = group
        self._is_global = is_global
        self._note = note
        self._twins: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()
        self.batch_sizes: list[int | None] = []

    def twin(self, loader: DataLoader[Any]) -> DataLoader[Any] | None:
        """Return the loader that yields this rank's share, None to leave `loader` whole."""
        if loader in self._twins:
            return self._twins[loader]
        if isinstance(loader.batch_sampler, _Shares):  # a twin itself
            return None
        reason = why_whole(loader)
        if reason is not None:
            if reason:
                self._note(f"1 DataLoader left whole: {reason}")
            return None
        twin = self._make(loader)
        self._twins[loader] = twin
        self.batch_sizes.append(loader.batch_size)
        return twin

    def _make(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        shares = _Shares(
            loader.batch_sampler, self._group,
            is_global=self._is_global, drop_last=loader.drop_last,
        )  # fmt: skip
        workers: dict[str, Any] = {}
        if loader.num_workers:
            workers = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
                "multiprocessing_context": loader.multiprocessing_context,
            }
        return DataLoader(
            loader.dataset,
            batch_sampler=shares,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            **workers,
        )


def why_whole(loader: DataLoader[Any]) -> str | None:
    """Return why a loader is not divided: None if it is, "" if there is nothing to say."""
    if isinstance(loader.dataset, IterableDataset):
        return (
            "an IterableDataset cannot be divided from outside; every rank reads all of it, "
            "unless its __iter__ uses rank and world_size"
        )
    if isinstance(loader.sampler, DistributedSampler) or isinstance(
        getattr(loader.batch_sampler, "sampler", None), DistributedSampler
    ):
        return ""  # the user divided it
    if loader.batch_sampler is None:
        return "batch_size=None loads samples one by one"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"it has a batch sampler of its own ({type(loader.batch_sampler).__name__})"
    if isinstance(loader.sampler, SequentialSampler):
        return ""  # does not shuffle: evaluation
    if not isinstance(loader.sampler, _SHUFFLING):
        return f"it has a sampler of its own ({type(loader.sampler).__name__})"
    return None


class TimedBatches:
    """An iterator over batches that reports each one and how long it took to come.

    Args:
        batches: the DataLoader's own iterator.
        shares: what this rank's part of each batch counts; empty if it is whole.
        on_ask: called when the next batch is asked for.
        on_batch: called with the samples in the batch, its weight and the seconds waited.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        shares: Callable[[], list[Share]],
        on_ask: Callable[[], None],
        on_batch: Callable[[int, float, float], None],
    ) -> None:
        self._batches = batches
        self._shares = shares
        self._on_ask = on_ask
        self._on_batch = on_batch
        self._num = 0

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Any:
        __tracebackhide__ = True
        self._on_ask()
        start = time.perf_counter()
        batch = next(self._batches)
        wait_s = time.perf_counter() - start
        shares = self._shares()
        if shares:
            share = shares[self._num]
            self._on_batch(share.num_samples, share.weight, wait_s)
        else:
            self._on_batch(num_samples(batch), 1.0, wait_s)
        self._num += 1
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  torch's iterators have a length


def num_samples(batch: Any) -> int:
    """Return the size of the first tensor's first dimension in a batch, 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return next((n for n in map(num_samples, batch) if n), 0)
    return 0
