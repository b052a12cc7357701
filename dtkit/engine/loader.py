"""DataLoaders in a run: one that trains is divided among the ranks."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from dtkit.engine import randomness
from dtkit.engine.drawn import Drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["ShardedLoaders", "Share", "Shares", "shares_of", "skip"]

_CHUNK = 256
"""Batches of the order that rank 0 sends at once; a sampler may be endless."""

# Any, below: datasets and batches are the user's own.


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's part of one global batch.

    Attributes:
        indices: the samples to load; never empty, see `weight`.
        num_samples: how many of them count (0: the batch was too small for all
            ranks, and this one loads samples for nothing).
        weight: what the rank's mean gradient must be multiplied with so that
            the average over ranks is the mean over the global batch.
        even: the global batch's size over the number of ranks.
    """

    indices: list[Any]
    num_samples: int
    weight: float
    even: float


def split(batch: list[Any], rank: int, world_size: int, least: int = 1) -> Share:
    """Return `rank`'s share of a global batch; shares differ by one sample at most.

    Args:
        batch: the global batch's indices.
        rank: whose share.
        world_size: among how many ranks.
        least: no rank gets fewer samples than this, and so some may get none.
    """
    num_shares = max(1, min(world_size, len(batch) // least))
    size, extra = divmod(len(batch), num_shares)
    start = rank * size + min(rank, extra)
    mine = batch[start : start + size + (rank < extra)] if rank < num_shares else []
    even = len(batch) / world_size
    return Share(mine or batch[:least], len(mine), len(mine) / even, even)


def merge(batches: Iterable[Iterable[Any]], num: int, *, drop_last: bool) -> Iterator[list[Any]]:
    """Join every `num` batches into a global one.

    With `drop_last` an incomplete one is left out, unless there is no other: a
    loop over a small data set should not become a loop over nothing.
    """
    joined: list[Any] = []
    count = num_joined = 0
    for batch in batches:
        joined += batch
        count += 1
        if count == num:
            yield joined
            joined, count, num_joined = [], 0, num_joined + 1
    if joined and not (drop_last and num_joined):
        yield joined


class Shares:
    """A batch sampler: the written one's batches, this rank's share of each.

    Rank 0 draws the order, from the user's own sampler and exactly when it
    would have been drawn on one device, and sends it to the others. So one
    device and N ranks see the same global batches, whatever the sampler is and
    whether or not the cell sets a seed.
    """

    def __init__(
        self, written: Iterable[Iterable[Any]], group: dist.ProcessGroup, *, is_global: bool,
        drop_last: bool, place: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self._written = written
        self._group = group
        # Which part of the data, of how many: one for each rank, unless ranks share a model.
        self._rank, self._world_size = place or (dist.get_rank(group), dist.get_world_size(group))
        self._is_first = dist.get_rank(self._group) == 0
        self._num_merged = 1 if is_global else self._world_size
        self._drop_last = drop_last
        self.newest: deque[Share] = deque()
        """Shares of the iteration that was begun last, as far as they were drawn."""
        self.drawn: Drawn | None = None
        """Of the iteration that was begun last; None if the samples have no numbers."""
        self.num_samples: int | None = None
        """Of the data set."""
        self._skipped: tuple[int, Callable[[], None]] = (0, _do_nothing)

    def skip(self, num: int, then: Callable[[], None]) -> None:
        """Leave out the first batches of the next iteration; `then` is called after."""
        self._skipped = (num, then)

    def __iter__(self) -> Iterator[list[Any]]:
        self.newest = deque()
        # A generator, like BatchSampler's own: torch draws the workers' base seed
        # after iter() and before the first batch, and the order comes after it.
        return self._draw(self.newest)

    def __len__(self) -> int:
        num = len(self._written)  # type: ignore[arg-type]  # TypeError if it has no length
        whole, rest = divmod(num, self._num_merged)
        return whole + bool(rest and not (self._drop_last and whole))

    def _draw(self, shares: deque[Share]) -> Iterator[list[Any]]:
        # Here and not in __iter__, which torch calls twice when there are workers.
        num_skipped, then = self._take_skipped()
        self._begun()
        full = 0
        batches = merge(self._receive(), self._num_merged, drop_last=self._drop_last)
        for number, batch in enumerate(batches, start=1):
            full = max(full, len(batch))
            if number == num_skipped:
                then()
            if number <= num_skipped:
                continue
            # A remainder may be so small that a rank would get one sample, which
            # BatchNorm refuses in training though it took the remainder as a whole.
            least = 2 if full >= 2 * self._world_size and len(batch) > 1 else 1
            yield self._give(split(batch, self._rank, self._world_size, least), shares)
        self._ended()

    def _take_skipped(self) -> tuple[int, Callable[[], None]]:
        """Return what the iteration that begins leaves out; the next one leaves out nothing."""
        skipped, self._skipped = self._skipped, (0, _do_nothing)
        return skipped

    def _begun(self) -> None:
        self.drawn = None if self.num_samples is None else Drawn(self.num_samples)

    def _give(self, share: Share, shares: deque[Share]) -> list[Any]:
        """Note a share; returns the samples to load."""
        shares.append(share)
        if self.drawn is not None and share.num_samples:
            self.drawn.add(share.indices)
        return share.indices

    def _ended(self) -> None:
        if self.drawn is not None:
            self.drawn.is_whole = True

    def _receive(self) -> Iterator[list[Any]]:
        """Yield the written batches as rank 0 draws them."""
        first = randomness.fingerprint()
        written = map(list, self._written) if self._is_first else iter(())
        while True:
            sent: list[Any] = [(first, list(islice(written, _CHUNK)))]
            dist.broadcast_object_list(
                sent, group=self._group, group_src=0, device=torch.device("cpu")
            )
            first, batches = sent[0]
            randomness.part(self._rank, first)
            yield from batches
            if len(batches) < _CHUNK:
                return


class ShardedLoaders:
    """Makes and remembers the divided twin of each DataLoader that trains.

    Args:
        group: the ranks among whom the data is divided.
        is_global: whether the written batch size is that of all ranks together.

    Attributes:
        num_ranks: how many ranks there are.
        rank: which part of the data is this rank's.
        num_parts: into how many it is divided: one for each rank, until `divide` is called.
    """

    def __init__(self, group: dist.ProcessGroup, *, is_global: bool) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.num_ranks: int = dist.get_world_size(group)
        self.num_parts: int = self.num_ranks
        self.is_global = is_global
        self._twins: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()
        self.batch_sizes: list[int] = []
        """As written, of the loaders that were divided; 0: not known."""
        self.make_shares: Callable[[Any, int], Shares] = self._divide
        """Given the written batches and the number of loaders before, returns the shares."""

    def drawn(self) -> WeakKeyDictionary[DataLoader[Any], Drawn]:
        """Return what each loader's newest pass drew on this rank."""
        found = {loader: _batches_of(twin).drawn for loader, twin in self._twins.items()}
        return WeakKeyDictionary({k: v for k, v in found.items() if v is not None})

    def divide(self, rank: int, num_parts: int) -> None:
        """Divide the data otherwise: ranks that hold one model together get the same."""
        if (rank, num_parts) != (self.rank, self.num_parts):
            self.rank, self.num_parts = rank, num_parts
            self._twins.clear()
            self.batch_sizes.clear()

    def twin(self, loader: DataLoader[Any]) -> DataLoader[Any] | None:
        """Return the loader that yields this rank's share, None to leave `loader` whole."""
        if isinstance(_batches_of(loader), Shares) or why_whole(loader) is not None:
            return None
        if loader not in self._twins:
            self._twins[loader] = self._make(loader)
            self.batch_sizes.append(getattr(_batches_of(loader), "batch_size", 0))
        return self._twins[loader]

    def _make(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        shares = self.make_shares(_batches_of(loader), len(self.batch_sizes))
        with contextlib.suppress(TypeError, NotImplementedError):  # it has no length
            shares.num_samples = len(loader.dataset)  # type: ignore[arg-type]
        twin = copy.copy(loader)  # of the same class, with all that the cell set on it
        # A DataLoader refuses assignment to these. Workers are never shared.
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        # In order, because the n-th batch is matched with the n-th share.
        twin.__dict__.update({name: shares, "_iterator": None, "in_order": True})
        return twin

    def _divide(self, written: Any, _number: int) -> Shares:
        drop_last = bool(getattr(written, "drop_last", False))
        return Shares(
            written, self.group, is_global=self.is_global, drop_last=drop_last,
            place=(self.rank, self.num_parts),
        )  # fmt: skip


def skip(twin: DataLoader[Any], num: int, then: Callable[[], None]) -> None:
    """Let the next iteration over a divided loader leave out batches, without loading them."""
    _batches_of(twin).skip(num, then)


def shares_of(twin: DataLoader[Any]) -> deque[Share]:
    """Return the shares of the iteration that was begun last."""
    return _batches_of(twin).newest  # type: ignore[no-any-return]


def why_whole(loader: DataLoader[Any]) -> str | None:
    """Return why a loader is not divided: None if it is, "" if there is nothing to say."""
    batches = _batches_of(loader)
    inner = getattr(batches, "sampler", None)
    reason: str | None = None
    if isinstance(loader.dataset, IterableDataset):
        reason = (
            "an IterableDataset cannot be divided from outside; every rank reads all of it, "
            "unless its __iter__ uses rank and world_size"
        )
    elif any(hasattr(s, "num_replicas") for s in (loader.sampler, batches, inner)):
        reason = ""  # a DistributedSampler or one like it: the user divided it
    elif batches is None:
        reason = "batch_size=None loads samples one by one"
    elif type(batches) is BatchSampler and isinstance(inner, SequentialSampler):
        # Not divided, so that evaluation stays right.
        reason = "it does not shuffle; every rank trains on all of it (shuffle=True divides it)"
    return reason


def _batches_of(loader: DataLoader[Any]) -> Any:
    """Return what yields the indices of whole batches, None if nothing does."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    # batch_size=None with a sampler of batches: the data set loads them at once.
    return loader.sampler if isinstance(loader.sampler, BatchSampler | Shares) else None


def _do_nothing() -> None:
    pass
