"""Tuning: which batch fits and is worth it, which learning rates train. It proposes, no more."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit.errors import InvalidInputError
from dtkit.options import RunOptions
from dtkit.views.comparison import smoothed
from dtkit.views.tuneview import BatchTrial, batch_bundle, batch_text, lr_bundle

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import NDArray

    from dtkit.driver.runs.run import Run
    from dtkit.driver.trials.trial import Trials
    from dtkit.recipe import Recipe

    Floats = NDArray[np.float64]

__all__ = ["BatchTuning", "LrTuning", "TuneSettings"]

_KNEE = 0.9
"""The smallest batch with this share of the best throughput is the knee."""
_WARM_STEPS = 2
"""Steps of a trial that are not timed: they load what later ones find loaded."""
_SURE_STEPS = 3
"""Steps that have to be timed: of one or two, what happens beside them may be most."""
_PRECISION = 8
"""The largest batch is found to within one part in so many."""
_DIVERGED = 4.0
"""A loss this many times the lowest ends a range test. source: fast.ai's learning rate finder."""
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|MemoryError|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """How `%dist_tune` searches.

    Attributes:
        num_steps: of each trial of a batch (12 if None), or of the range test (100 if None).
        first_batch: where the search of the batch begins.
        most_batch: where it ends, if memory and data do not end it before.
        memory_bytes: on CPU, what a rank may take beside what it has; None: its part of what is
            free. A GPU has its own limit.
        low: the range test's first learning rate.
        high: its last.
    """

    num_steps: int | None = None
    first_batch: int = 8
    most_batch: int = 65_536
    memory_bytes: int | None = None
    low: float = 1e-6
    high: float = 1.0

    def __post_init__(self) -> None:
        least = _WARM_STEPS + 1
        if self.num_steps is not None and self.num_steps < least:
            msg = f"--steps {self.num_steps}: {least} or more"
            raise InvalidInputError(msg)
        if not 1 <= self.first_batch <= self.most_batch:
            msg = f"--from {self.first_batch} --most {self.most_batch}: 1 <= from <= most"
            raise InvalidInputError(msg)
        if not 0 < self.low < self.high:
            msg = f"--low {self.low} --high {self.high}: 0 < low < high"
            raise InvalidInputError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOptions(RunOptions):
    """The options of a trial: a run that ends early.

    Attributes:
        memory_bytes: see `TuneSettings`; 0: the trial's memory is not limited.
        lr_range: first and last learning rate, if the trial goes through a range.
    """

    memory_bytes: int | None = 0
    lr_range: tuple[float, float] | None = None

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what takes part in the trial."""
        parts = RunOptions.parts(self)
        if self.memory_bytes != 0:
            parts.append(
                ("dtkit.engine.parts.limits:make_budget", {"memory_bytes": self.memory_bytes})
            )
        if self.lr_range is not None:
            low, high = self.lr_range
            arguments = {"low": low, "high": high, "num_steps": self.max_steps}
            parts.append(("dtkit.engine.parts.limits:make_lr_range", arguments))
        return parts


class BatchTuning:
    """The batches that fit on all ranks together, and how fast each is.

    Attributes:
        trials: in order of size.
        notes: what the user should know.
    """

    def __init__(self, recipe: Recipe, settings: TuneSettings) -> None:
        self.trials: list[BatchTrial] = []
        self.notes: list[str] = []
        self._recipe = recipe
        self._settings = settings

    @property
    def largest(self) -> int | None:
        """The largest batch that fits; None: none was found."""
        return max((t.batch_size for t in self.trials if t.state == "fits"), default=None)

    @property
    def knee(self) -> int | None:
        """The smallest batch that is nearly as fast as the fastest; None: none was found."""
        timed = [t for t in self.trials if t.is_timed]
        sure = [t for t in timed if t.num_timed >= _SURE_STEPS] or timed
        rates = {t.batch_size: t.samples_per_s for t in sure}
        best = max(rates.values(), default=math.nan)
        return min((b for b, rate in rates.items() if rate >= _KNEE * best), default=None)

    def search(self, trials: Trials) -> Iterator[None]:
        """Double the batch until it does not fit, then halve the gap."""
        with trials:
            self.notes += trials.notes
            fits, size, limit = 0, self._settings.first_batch, math.inf
            while size <= self._settings.most_batch and not trials.is_stopped():
                run = yield from trials.run(
                    replace(self._recipe, batch_size=size), self._options(), _name("batch", size)
                )
                trial = self._judge(run, size)
                if trials.is_stopped():
                    break
                self.trials = sorted([*self.trials, trial], key=lambda t: t.batch_size)
                if trial.state == "fits":
                    fits = size
                else:
                    limit = size
                if trial.state in ("failed", "more than the data"):
                    break
                if limit == math.inf:
                    size *= 2
                elif fits and limit - fits > max(1, fits // _PRECISION):
                    size = (fits + int(limit)) // 2
                else:
                    break
        if trials.is_stopped():
            self.notes.append("stopped: larger batches may fit")
        unsure = [t.batch_size for t in self.trials if t.is_timed and t.num_timed < _SURE_STEPS]
        if unsure:
            self.notes.append(
                f"samples/s of {', '.join(map(str, unsure))}: fewer than {_SURE_STEPS} full "
                "batches were timed; let the cell run more epochs, or take more --steps"
            )

    def _options(self) -> TrialOptions:
        return TrialOptions(
            max_steps=self._settings.num_steps or 12, memory_bytes=self._settings.memory_bytes
        )

    def _judge(self, run: Run, size: int) -> BatchTrial:
        if run.error is not None:
            text = str(run.error)
            state = "out of memory" if _OUT_OF_MEMORY.search(text) else "failed"
            return BatchTrial(size, state, error=text)
        missing = [note for note in run.notes if "changed nothing" in note]
        if missing:
            return BatchTrial(size, "failed", error=missing[0])
        history = run.history
        samples = history["samples_per_s"] * history["step_ms"] / 1000.0
        num_ranks = len(run.ranks) if self._recipe.batch == "rank" else 1
        wanted = size * num_ranks * self._recipe.accumulate
        if not len(samples) or np.nanmax(samples) < 0.999 * wanted:
            return BatchTrial(size, "more than the data")
        # The last batch of an epoch is smaller, and the first steps load what is missing.
        full = np.flatnonzero(samples >= 0.999 * wanted)
        warm = full[full >= _WARM_STEPS]
        timed = warm if len(warm) else full[-1:]
        rate = float(np.median(history["samples_per_s"][timed]))
        return BatchTrial(size, "fits", rate, run.view().peak_gib, num_timed=len(warm))

    def proposal(self) -> str:
        """Return what to write, in one line."""
        if self.largest is None:
            why = self.trials[-1] if self.trials else None
            return f"no batch size was found: {why.error or why.state if why else 'nothing ran'}"
        first = f"batch_size={self.knee} is as fast as it gets within {1 - _KNEE:.0%}"
        return f"{first}; the largest that fits is {self.largest}"

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        return batch_bundle(self.trials, self.knee, self.proposal(), self.notes)

    def __repr__(self) -> str:
        return batch_text(self.trials, self.proposal(), self.notes)


class LrTuning:
    """The loss over learning rates that rise exponentially from step to step.

    Attributes:
        lr: (num_steps,) float64.
        loss: (num_steps,) float64, smoothed, mean over ranks.
        notes: what the user should know.
    """

    def __init__(self, recipe: Recipe, settings: TuneSettings) -> None:
        self.lr: Floats = np.empty(0)
        self.loss: Floats = np.empty(0)
        self.notes: list[str] = []
        self._recipe = recipe
        self._settings = settings

    @property
    def steepest(self) -> float:
        """The learning rate at which the loss falls fastest; NaN: it never falls."""
        if len(self.loss) < 4:  # noqa: PLR2004  no slope
            return math.nan
        end = int(np.nanargmin(self.loss)) + 1
        slope = np.gradient(self.loss, np.log(self.lr))[:end]
        best = int(np.nanargmin(slope))
        return float(self.lr[best]) if slope[best] < 0 else math.nan

    @property
    def diverges(self) -> float:
        """The learning rate from which on the loss is lost; NaN: not within the range."""
        low = np.fmin.accumulate(self.loss) if len(self.loss) else self.loss
        lost = np.flatnonzero(~(self.loss <= _DIVERGED * low))
        return float(self.lr[lost[0]]) if len(lost) else math.nan

    def search(self, trials: Trials) -> Iterator[None]:
        """Go through the range once, in as many steps as the cell makes if those are fewer."""
        num_steps = self._settings.num_steps or 100
        with trials:
            self.notes += trials.notes
            run = yield from self._test(trials, num_steps)
            made = run.history.num_steps
            if run.state == "finished" and _WARM_STEPS < made < num_steps:
                self.notes.append(f"the cell makes {made} steps: the range was divided into these")
                run = yield from self._test(trials, made)
        if run.error is not None:
            raise run.error
        history = run.history
        known = np.flatnonzero(np.isfinite(history["loss"]))
        self.lr, self.loss = history["lr"][known], smoothed(history["loss"][known])
        if trials.is_stopped():
            self.notes.append("stopped before the highest learning rate")

    def _test(self, trials: Trials, num_steps: int) -> Generator[None, None, Run]:
        options = TrialOptions(
            max_steps=num_steps, lr_range=(self._settings.low, self._settings.high)
        )
        return trials.run(self._recipe, options, _name("lr"))

    def proposal(self) -> str:
        """Return what to write, in one line."""
        if math.isnan(self.steepest):
            return "no learning rate of this range lets the loss fall: try another one"
        text = f"lr={_two_digits(self.steepest)}: there the loss falls fastest"
        if not math.isnan(self.diverges):
            text += f"; from {_two_digits(self.diverges)} on it is lost"
        return text

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, str]:
        return lr_bundle(self.lr, self.loss, self.steepest, self.proposal(), self.notes)

    def __repr__(self) -> str:
        return "\n".join([self.proposal(), *self.notes])


def _name(*parts: object) -> str:
    return "-".join(["tune", time.strftime("%Y%m%d-%H%M%S"), *map(str, parts)])


def _two_digits(value: float) -> str:
    return f"{value:.2g}"
