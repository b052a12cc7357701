"""Batches that a cell draws from a DataLoader: timed, counted, and told when they end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.engine.loader import Share

__all__ = ["TimedBatches", "num_samples"]

# Any, below: batches are the user's own.


class TimedBatches:
    """An iterator over batches that reports each one and how long it took to come.

    Args:
        batches: the DataLoader's own iterator.
        shares: what this rank's part of each batch counts; None if it is whole.
        on_ask: called when the next batch is asked for.
        on_batch: called with the batch, its share, the seconds waited and whether the
            batch is the last; at the end with None, None, 0 and False.
        looks_ahead: whether to find out which batch is the last by drawing the next
            one early, if there is no length to tell it.
        num_skipped: how many batches an earlier run had trained on.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        shares: deque[Share] | None,
        on_ask: Callable[[], None],
        on_batch: Callable[[Any, Share | None, float, bool], None],
        *,
        looks_ahead: bool = False,
        num_skipped: int = 0,
    ) -> None:
        self._batches = batches
        self._is_last = False
        self._num_left = _length(batches, num_skipped)
        self._ahead = deque(islice(batches, 1)) if looks_ahead and self._num_left is None else None
        self._shares = shares
        self._on_ask = on_ask
        self._on_batch = on_batch

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Any:
        __tracebackhide__ = True
        self._on_ask()
        start = time.perf_counter()
        try:
            batch = self._draw()
        except StopIteration:
            self._on_batch(None, None, 0.0, False)
            raise
        wait_s = time.perf_counter() - start
        share = self._shares.popleft() if self._shares else None
        self._on_batch(batch, share, wait_s, self._is_last)
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # torch's iterators have a length

    def _draw(self) -> Any:
        if self._ahead is not None:
            if not self._ahead:
                raise StopIteration
            batch = self._ahead.popleft()
            self._ahead.extend(islice(self._batches, 1))
            self._is_last = not self._ahead
            return batch
        batch = next(self._batches)
        if self._num_left is not None:
            self._num_left -= 1
            self._is_last = self._num_left == 0
        return batch


def _length(batches: Any, num_skipped: int) -> int | None:
    try:
        return len(batches) - num_skipped
    except (TypeError, NotImplementedError):
        return None


def num_samples(batch: Any) -> int:
    """Return the size of the first tensor's first dimension in a batch, 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    if not isinstance(batch, list | tuple):  # asked first: the other question is a slow one
        batch = batch.values() if isinstance(batch, Mapping) else ()
    for part in batch:
        num = num_samples(part)
        if num:
            return num
    return 0
