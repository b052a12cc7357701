"""Feeding: what a run sees of the cell's DataLoaders, and what it makes of their batches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from dtkit.engine.batches import TimedBatches, num_samples
from dtkit.engine.loader import shares_of, skip
from dtkit.engine.position import Position

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.data import DataLoader

    from dtkit.engine.accumulate import Accumulation
    from dtkit.engine.autopilot import Autopilot
    from dtkit.engine.loader import Share
    from dtkit.engine.position import Pass
    from dtkit.engine.recorder import Recorder

__all__ = ["Feeding"]

# Any, below: batches are the user's own.


class Feeding:
    """Divides the loaders that train, and tells of every batch that is drawn from one.

    Attributes:
        position: where the run is in its data.
        num_batches: drawn since it was last set to 0, which whoever counts steps does.

    Args:
        recorder: is told how many samples there were, and how long they were waited for.
        autopilot: divides; None: nothing is divided.
        accumulation: is told where the data ends.
        boundary: called before a batch is drawn that does not train.
        ask: called before one that may.
        listeners: called when one is there, with the seconds that it was waited for.
    """

    def __init__(
        self,
        recorder: Recorder,
        autopilot: Autopilot | None,
        accumulation: Accumulation,
        *,
        boundary: Callable[[], None],
        ask: Callable[[], None],
        listeners: Sequence[Callable[[float], None]],
    ) -> None:
        self.position: Position = Position()
        self.num_batches: int = 0
        self._recorder = recorder
        self._autopilot = autopilot
        self._accumulation = accumulation
        self._boundary, self._ask = boundary, ask
        self._listeners = listeners
        self._whole: DataLoader[Any] | None = None
        """Where the newest batch came from, if it may be worth a note that it was not divided."""
        self._judged: DataLoader[Any] | None = None
        self._noted: WeakSet[DataLoader[Any]] = WeakSet()
        self._has_share = False

    def iterate(self, loader: DataLoader[Any], original: Callable[..., Any]) -> Iterator[Any]:
        """Return the loader's batches, timed, and divided if it is a training loader."""
        if self._is_evaluating():
            return TimedBatches(original(loader), None, self._boundary, _forget)
        twin = self._autopilot.twin(loader) if self._autopilot is not None else None
        begun = self.position.begin(loader)
        if twin is not None and begun.num_skipped:
            skip(twin, begun.num_skipped, begun.skipped)
        # Not `twin or loader`: that would ask for a length, which it may not have.
        batches = original(loader if twin is None else twin)
        if twin is None:
            begun.skip(batches)
        shares = None if twin is None else shares_of(twin)

        saw = (
            partial(self._saw_share, begun)
            if twin is not None
            else partial(self._saw_whole, begun, loader)
        )
        return TimedBatches(
            batches, shares, self._ask, saw,
            looks_ahead=self._accumulation.is_on, num_skipped=begun.num_skipped,
        )  # fmt: skip

    def length(self, loader: DataLoader[Any], original: Callable[..., int]) -> int:
        """Return the number of batches that this rank will get."""
        if self._autopilot is None or self._autopilot.is_evaluating():
            return original(loader)
        twin = self._autopilot.twin(loader)
        return original(loader if twin is None else twin)

    def used(self) -> None:
        """Note that the newest batch is trained on: a backward pass begins.

        The user is told, once for each, of loaders that train and were not divided.
        """
        self._has_share = False
        if self._autopilot is None or self._whole is None:
            return
        loader, self._whole = self._whole, None
        self._judged = loader
        if loader not in self._noted:
            self._noted.add(loader)
            self._autopilot.trained_on_whole(loader)

    def _is_evaluating(self) -> bool:
        if self._autopilot is None:
            return not torch.is_grad_enabled()
        return self._autopilot.is_evaluating()

    def _saw_share(
        self,
        of: Pass,
        _batch: Any,
        share: Share | None,
        wait_s: float,
        is_last: bool,  # noqa: FBT001
    ) -> None:
        assert self._autopilot is not None  # noqa: S101  for the type checker: it makes shares
        if share is None:  # the end: what comes next is no share of anything
            of.is_over = True
            self._autopilot.batch_weight = 1.0
            return
        self.num_batches += 1
        self._recorder.saw_batch(share.num_samples, share.even, wait_s)
        self._tell_batch(of, wait_s)
        self._accumulation.saw_batch(share.even, is_last=is_last)
        self._autopilot.weigh(share.weight, is_another=self._has_share)
        self._has_share = True

    def _saw_whole(
        self,
        of: Pass,
        loader: DataLoader[Any],
        batch: Any,
        _share: Share | None,
        wait_s: float,
        is_last: bool,  # noqa: FBT001
    ) -> None:
        if batch is None:  # the end
            of.is_over = True
            return
        self.num_batches += 1
        num = num_samples(batch)
        self._recorder.saw_batch(num, num, wait_s, is_whole=True)
        self._tell_batch(of, wait_s)
        self._accumulation.saw_batch(num, is_last=is_last)
        if loader is not self._judged:
            self._whole = loader

    def _tell_batch(self, of: Pass, wait_s: float) -> None:
        self.position.got_batch(of)
        for tell in self._listeners:
            tell(wait_s)


def _forget(*_details: Any) -> None:
    """Take a batch that does not train."""
