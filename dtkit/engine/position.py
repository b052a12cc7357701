"""Where a run is in its data, so that another one can go on from there.

A pass over a DataLoader is known by the random state it began with, which gives
its order, and by the number of batches that were trained on. A resumed run
begins the same pass, skips those batches, and then takes the random state that
the checkpoint was made with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dtkit.engine import randomness

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.utils.data import DataLoader

__all__ = ["Pass", "Position"]

# Any, below: batches, and saved states that are nested plain values.


class Pass:
    """One pass of the cell over one loader.

    Attributes:
        epoch: how many passes over this loader trained before.
        num_batches: how many batches the cell has got.
        has_trained: whether a step was made in it.
        is_over: whether the cell has been told that there are no more batches.
        num_skipped: how many batches an earlier run had trained on.
    """

    def __init__(self, loader: DataLoader[Any], epoch: int, saved: dict[str, Any] | None) -> None:
        self.epoch = epoch
        self.has_trained = self.is_over = False
        self.num_skipped = self.num_batches = saved["num_batches"] if saved else 0
        self._rng_after = saved["rng_after"] if saved else None
        self._generators = _generators(loader)
        if saved and saved["begin"] is not None:
            randomness.restore(saved["begin"])
        for generator, state in zip(
            self._generators, (saved or {}).get("generators", ()), strict=False
        ):
            generator.set_state(state)
        self._begin = randomness.snapshot()
        self._begin_generators = [g.get_state() for g in self._generators]

    def skipped(self) -> None:
        """Note that the batches of the earlier run have been passed over."""
        if self.num_skipped and self._rng_after is not None:
            randomness.restore(self._rng_after)

    def skip(self, batches: Iterator[Any]) -> None:
        """Pass over the batches of the earlier run by reading them."""
        for _ in range(self.num_skipped):
            next(batches, None)
        self.skipped()

    def state(self) -> dict[str, Any]:
        """Return where the pass is."""
        if self.is_over:
            # The next one has not begun: it will, with whatever state there is then.
            generators = [g.get_state() for g in self._generators]
            return {"epoch": self.epoch + self.has_trained, "num_batches": 0, "begin": None,
                    "generators": generators}  # fmt: skip
        return {"epoch": self.epoch, "num_batches": self.num_batches, "begin": self._begin,
                "generators": self._begin_generators}  # fmt: skip


class Position:
    """Counts steps and follows the loaders of a run, in the order in which they are first used."""

    def __init__(self) -> None:
        self.step: int = 0
        """Optimizer steps, those of the run that this one goes on from included."""
        self.num_skipped: int = 0
        """Batches of the cell's loops that an earlier run had trained on."""
        self._numbers: WeakKeyDictionary[DataLoader[Any], int] = WeakKeyDictionary()
        self._passes: dict[int, Pass] = {}
        self._newest: Pass | None = None
        self._saved: dict[int, dict[str, Any]] = {}
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch that goes on, or the next one if none does."""
        if self._newest is None:
            return self._epoch
        return int(self._newest.state()["epoch"])

    def begin(self, loader: DataLoader[Any]) -> Pass:
        """Note that the cell begins to iterate over a loader, before any of it is drawn."""
        number = self._numbers.setdefault(loader, len(self._numbers))
        before, saved = self._passes.get(number), self._saved.pop(number, None)
        epoch = 0 if before is None else before.epoch + before.has_trained
        begun = Pass(loader, saved["epoch"] if saved else epoch, saved)
        self._passes[number] = self._newest = begun
        self.num_skipped += begun.num_skipped
        return begun

    def got_batch(self, of: Pass) -> None:
        """Note that the cell has got a batch."""
        of.num_batches += 1
        self._newest = of

    def stepped(self) -> None:
        """Note a step of the run's leading optimizer."""
        self.step += 1
        if self._newest is not None:
            self._newest.has_trained = True

    def state(self) -> dict[str, Any]:
        """Return where the run is, and this rank's random state: plain values and tensors."""
        passes = self._saved | {number: of.state() for number, of in self._passes.items()}
        return {"step": self.step, "epoch": self.epoch, "passes": passes,
                "rng": randomness.snapshot()}  # fmt: skip

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Take this rank's random state, and let each loader go on from where it was."""
        self.step, self._epoch = state["step"], state["epoch"]
        self._newest = None
        self._passes.clear()
        self._saved = {
            number: {"rng_after": state["rng"], **saved}
            for number, saved in state["passes"].items()
        }
        randomness.restore(state["rng"])


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Return the generators that the cell gave to a loader and its samplers, each once."""
    batches = loader.batch_sampler
    owners = [loader, loader.sampler, batches, getattr(batches, "sampler", None)]
    found = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if g is not None}
    return list(found.values())
