"""Another batch size than the written one: the DataLoaders of an unedited cell that train."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from dtkit.engine.parts import Part
from dtkit.engine.patches import replaced

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.engine.run import ActiveRun

__all__ = ["make"]

# Any, below: datasets and batches are the user's own.


class BatchSize(Part):
    """Lets DataLoaders that shuffle yield batches of another size while the cell trains.

    The loader itself stays as it is: a copy is iterated over in its place. One that does not
    shuffle, or whose batches come from a sampler of the user's own, is left alone.
    """

    def __init__(self, run: ActiveRun, batch_size: int) -> None:
        self._run = run
        self._batch_size = batch_size
        self._copies: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()
        self._written: list[int] = []
        self._stack = ExitStack()

    def begin(self) -> None:
        """Patch how a DataLoader is iterated over, and how long it says it is."""
        for name in ("__iter__", "__len__"):
            self._stack.enter_context(replaced(DataLoader, name, self._redirected))

    def end(self, state: str) -> None:
        """Put it back, and say what was done."""
        self._stack.close()
        if state == "failed" or self._run.rank != min(self._run.ranks):
            return
        if self._written:
            sizes = ", ".join(map(str, sorted(set(self._written))))
            self._run.note(f"batch size {self._batch_size} in place of the written {sizes}")
        else:
            self._run.note(
                f"batch size {self._batch_size} changed nothing: no DataLoader that shuffles and "
                "has a plain batch_size was trained on"
            )

    def _redirected(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda loader: original(self._resized(loader))

    def _resized(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        batches = loader.batch_sampler
        if (
            type(batches) is not BatchSampler
            or isinstance(batches.sampler, SequentialSampler)
            or self._is_evaluating()
        ):
            return loader
        if loader not in self._copies:
            resized = copy.copy(loader)
            sampler = BatchSampler(batches.sampler, self._batch_size, batches.drop_last)
            # A DataLoader refuses assignment to these. Workers are never shared.
            resized.__dict__.update(
                batch_sampler=sampler, batch_size=self._batch_size, _iterator=None
            )
            self._copies[loader] = resized
            self._written.append(batches.batch_size)
        return self._copies[loader]

    def _is_evaluating(self) -> bool:
        autopilot = self._run.autopilot
        return not torch.is_grad_enabled() if autopilot is None else autopilot.is_evaluating()


def make(run: ActiveRun, *, batch_size: int) -> Part:
    """Return the part for a run."""
    return BatchSize(run, batch_size)
