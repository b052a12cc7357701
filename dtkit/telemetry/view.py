"""What a renderer may know of a run: immutable values, no behaviour.

Renderers are pure functions of a `RunView`. Every series is decimated to at
most `MAX_POINTS` points, so drawing costs the same after a million steps.
Unknown numbers are NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtkit.livecontrol import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dtkit.livecontrol import LiveControl, Value

    Floats = NDArray[np.float64]

__all__ = ["MAX_POINTS", "ControlChange", "ControlView", "Curve", "RankView", "RunView"]

MAX_POINTS = 600


@dataclass(frozen=True, slots=True)
class Curve:
    """One chart.

    Attributes:
        step: (num_points,) float64, at most `MAX_POINTS`.
        lines: by label, (num_points,) float64 each; NaN where nothing is known.
    """

    step: Floats
    lines: dict[str, Floats]


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank, now. Times are medians over its last 50 steps."""

    rank: int
    host: str
    device: str
    pid: int
    state: str
    """starting, running, paused, finished, stopped, failed or lost."""
    step: int
    step_ms: float
    compute_ms: float
    data_ms: float
    comm_ms: float
    samples_per_s: float
    """Of this rank alone."""
    peak_gib: float
    """GiB (2**30 bytes) of device memory, resident memory on CPU; high-water mark of the run."""
    gpu_percent: float = math.nan
    """Part of the last second in which its GPU computed; NaN without one, or without NVML."""
    gpu_gib: float = math.nan
    """What all processes have taken of it."""


@dataclass(frozen=True, slots=True)
class ControlView:
    """A live control and its present value."""

    control: LiveControl
    value: Value


@dataclass(frozen=True, slots=True)
class ControlChange:
    """New values of live controls: the step after `step` was the first with them."""

    step: int
    time_s: float
    """Since the run's start."""
    values: dict[str, Value]

    def __str__(self) -> str:
        """Return "lr_factor 0.5 from step 121 on"."""
        return f"{self.what} from step {self.step + 1:,} on"

    @property
    def what(self) -> str:
        """Names and new values."""
        return ", ".join(f"{name} {shown(value)}" for name, value in self.values.items())


@dataclass(frozen=True, slots=True)
class RunView:
    """A run, now: what the dashboard, the static summary and the text line show."""

    name: str
    state: str
    """starting, running, pausing, paused, stopping, finished, stopped or failed."""
    recipe: str
    """The flags that change how it trains, as typed; empty for the defaults."""
    elapsed_s: float
    eta_s: float
    """Seconds until `total_steps`, NaN when unknown."""
    step: int
    """Steps that every rank has finished."""
    total_steps: int | None
    """Estimated from the cell's loops; None when they do not tell."""
    loss: float
    """Smoothed, mean over ranks weighted by samples."""
    best_loss: float
    """Lowest smoothed loss so far."""
    samples_per_s: float
    """Over all ranks: in the last two seconds, and in the whole run once it has ended."""
    step_ms: float
    data_share: float
    """Part of the step spent waiting for data, 0 to 1, mean over ranks."""
    comm_share: float
    """Part of the step spent waiting for gradients of other ranks, 0 to 1."""
    sent_bytes: float
    """What a rank sends in a step to average, mean over the last 50 steps."""
    raw_bytes: float
    """What it would send without compression."""
    peak_gib: float
    """The largest of the ranks' peaks."""
    lr: float
    metrics: dict[str, float]
    """Newest value of everything given to `dtkit.log`, mean over ranks."""
    loss_curve: Curve
    """Lines "raw" and "smoothed"."""
    rate_curve: Curve
    """Samples/s: lines "all ranks", and "slowest" and "fastest" rank times the number of ranks."""
    ranks: tuple[RankView, ...]
    notes: tuple[str, ...]
    """What dtkit did to the cell, or left alone and why."""
    error: str | None
    staleness: tuple[tuple[int, int], ...] = ()
    """How many steps were made without so many updates of others; empty in step."""
    stall: str = ""
    """Why no step has ended for long, and whom the ranks wait for; empty while steps go on."""
    controls: tuple[ControlView, ...] = ()
    changes: tuple[ControlChange, ...] = ()
    """What the user changed while it went on, in order."""

    def place_of(self, rank: RankView) -> str:
        """Return "cuda:0", or "alpha cuda:0" if the ranks are on several hosts."""
        has_several = len({each.host for each in self.ranks if each.host}) > 1
        return f"{rank.host} {rank.device}" if has_several else rank.device

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and what was changed by hand."""
        return (*self.notes, *(f"changed by hand: {change}" for change in self.changes))
