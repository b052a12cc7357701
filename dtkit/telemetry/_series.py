"""Series of a run: a ring per rank, a growing table of merged steps, and what is drawn of them."""

from __future__ import annotations

import math
import mmap
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import OVER, STEP_COLUMNS
from dtkit.telemetry._rate import rate_of
from dtkit.telemetry.view import MAX_POINTS, RankView

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dtkit.events import GpuUse, StepBatch

    Floats = NDArray[np.float64]

__all__ = ["WINDOW", "RankSeries", "Rows", "Smoother", "binned", "decimate", "last", "mean",
           "median", "median_of_known", "new_rings", "recent_of", "rows_of", "share",
           "smoothed"]  # fmt: skip

WINDOW = 8192
"""Steps kept per rank; a rank may fall this far behind before its row is merged without it."""
_RECENT_STEPS = 50
_GIB = 2**30
_RATE_STEPS = 16
_ROW = ("step", "time_s", "loss", "smooth", "samples", "step_ms", "data_ms", "comm_ms", "lr",
        "rate_low", "rate_high", "sent_bytes", "raw_bytes")  # fmt: skip
_SUMS = ("samples", "step_ms", "rate_low * step_ms", "rate_high * step_ms")


_RECENT = [
    STEP_COLUMNS.index(name) for name in ("step", "step_ms", "data_ms", "comm_ms", "samples")
]


def new_rings(num_ranks: int) -> Floats:
    """Return rings for the last `WINDOW` steps of ranks, (num_ranks, num_columns, WINDOW).

    A place without a step has number 0. Pages of their own take no memory before something is
    written there, and go back to the system when the run is forgotten: in malloc's heap, where
    zeros of this size end up after the first run, each left some 100 kB behind.
    """
    shape = (num_ranks, len(STEP_COLUMNS), WINDOW)
    pages = mmap.mmap(-1, 8 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=np.float64).reshape(shape)


def rows_of(rings: Floats, steps: NDArray[np.int64]) -> Floats:
    """Return (num_ranks, num_columns, num_steps); columns of steps that are not here are NaN."""
    block: Floats = rings[:, :, (steps - 1) % WINDOW]
    block.transpose(0, 2, 1)[block[:, 0] != steps] = np.nan
    return block


def recent_of(rings: Floats, newest: Sequence[int]) -> Floats:
    """Return medians of each rank's last steps, (num_ranks, 4); NaN where it has made none.

    Args:
        rings: of `new_rings`.
        newest: each rank's last step.

    Returns:
        step_ms, data_ms, comm_ms, and samples/s of these steps together; the first step, which
        loads what the others find there, does not count if there are others.
    """
    steps = np.array(newest)[:, None] - np.arange(_RECENT_STEPS)
    ranks = np.arange(len(rings))
    block: Floats = rings[
        ranks[:, None, None], np.array(_RECENT)[:, None], (steps[:, None] - 1) % WINDOW
    ]
    block.transpose(0, 2, 1)[(block[:, 0] != steps) | (steps < 1)] = np.nan
    counted = np.where(((steps == 1) & (steps[:, :1] > 1))[:, None], np.nan, block[:, [4, 1]])
    rates = [rate_of(*sums) for sums in np.nansum(counted, axis=2)]
    return np.column_stack([median_of_known(block[:, 1:4]), rates])


class RankSeries:
    """Newest state of one rank, and a ring of its last `WINDOW` steps.

    Args:
        rank: which.
        ring: its own of `new_rings`.
    """

    def __init__(self, rank: int, ring: Floats) -> None:
        self.rank = rank
        self.host = self.device = ""
        self.pid = 0
        self.state = "starting"
        self.step = 0
        self.peak_bytes = 0
        self.end_s = math.inf
        self.last_s = 0.0
        self.ring: Floats = ring
        self.num_new = 0
        """Steps that have come since they were last made rows of the run."""
        self.gpu: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        """Step, part of the time that the GPU was busy, in percent, and GiB taken of it."""

    def is_over(self) -> bool:
        return self.state in (*OVER, "lost")

    def add(self, batch: StepBatch) -> None:
        self.peak_bytes = max(self.peak_bytes, batch.peak_bytes)
        if not batch.columns["step"]:
            return
        # A run that an older dtkit stored may lack a column.
        unknown = [math.nan] * len(batch.columns["step"])
        block = np.array([batch.columns.get(name, unknown) for name in STEP_COLUMNS])
        slots = (block[0].astype(np.int64) - 1) % WINDOW
        self.ring[:, slots] = block
        self.num_new += len(slots)
        self.step = max(self.step, int(block[0].max()))
        self.last_s = max(self.last_s, float(block[1].max()))

    def use_gpu(self, use: GpuUse) -> None:
        self.gpu.append((use.step, use.busy_percent, use.used_bytes / _GIB))

    def rows(self, steps: NDArray[np.int64]) -> Floats:
        """Return (num_columns, num_steps); columns of steps that are not here are NaN."""
        found: Floats = rows_of(self.ring[None], steps)[0]
        return found

    def ended_s(self, step: int) -> float:
        """Return when a step ended, since the run's start; inf: not yet; NaN: it is not kept."""
        if step > self.step:
            return math.inf
        number, time_s = self.ring[:2, (step - 1) % WINDOW]
        return float(time_s) if number == step else math.nan

    def view(self, recent: Sequence[float]) -> RankView:
        """Return it as it is now; `recent` is its row of `recent_of`."""
        step_ms, data_ms, comm_ms, rate = recent
        return RankView(
            rank=self.rank,
            host=self.host,
            device=self.device,
            pid=self.pid,
            state=self.state,
            step=self.step,
            step_ms=step_ms,
            compute_ms=step_ms - data_ms - comm_ms,
            data_ms=data_ms,
            comm_ms=comm_ms,
            samples_per_s=rate,
            peak_gib=self.peak_bytes / _GIB or math.nan,
            gpu_percent=self.gpu[-1][1] if self.gpu else math.nan,
            gpu_gib=self.gpu[-1][2] if self.gpu else math.nan,
        )


class Rows:
    """A growing table of merged steps, one row each."""

    names = _ROW

    def __init__(self) -> None:
        self._data: Floats = np.empty((len(_ROW), 1024))
        self._sums: Floats = np.zeros((len(_SUMS), 1025))
        self.num: int = 0

    def extend(self, block: Floats) -> None:
        before, self.num = self.num, self.num + block.shape[1]
        self._data = _grown(self._data, before, self.num)
        self._sums = _grown(self._sums, before + 1, self.num + 1)
        self._data[:, before : self.num] = block
        samples, ms, low, high = (
            self[name][before:] for name in ("samples", "step_ms", "rate_low", "rate_high")
        )
        with np.errstate(invalid="ignore"):
            new = np.nan_to_num([samples, ms, low * ms, high * ms], posinf=0.0)
        np.cumsum(new, axis=1, out=new)
        self._sums[:, before + 1 : self.num + 1] = self._sums[:, before, None] + new

    def sums(self, ends: NDArray[np.int64]) -> Floats:
        """Return `_SUMS` over the first rows up to each of `ends`, (4, num_ends)."""
        found: Floats = self._sums[:, ends]
        return found

    def __getitem__(self, name: str) -> Floats:
        return self._data[_ROW.index(name), : self.num]


def _grown(data: Floats, num: int, needed: int) -> Floats:
    """Return a table with room for `needed` columns, the first `num` of them kept."""
    if needed <= data.shape[1]:
        return data
    grown = np.empty((len(data), max(needed, 2 * data.shape[1])))
    grown[:, :num] = data[:, :num]
    return grown


class Smoother:
    """Exponential moving average that starts at the first value, not at zero."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = self._weight = 0.0

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan

    def extend(self, values: Floats) -> Floats:
        out = np.empty(len(values))
        for i, value in enumerate(values.tolist()):
            if math.isfinite(value):
                self._sum = self._decay * self._sum + (1 - self._decay) * value
                self._weight = self._decay * self._weight + (1 - self._decay)
            out[i] = self.value
        return out


def smoothed(values: Floats, decay: float) -> Floats:
    """Return the exponential moving average of a series; what is not finite adds nothing."""
    return Smoother(decay).extend(values)


def median(values: Floats) -> float:
    return float(np.median(values)) if len(values) else math.nan


def mean(values: Floats) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def last(values: Floats) -> float:
    return float(values[-1]) if len(values) else math.nan


def share(part: Floats, whole: Floats) -> float:
    return float(part.sum() / whole.sum()) if len(whole) and whole.sum() > 0 else math.nan


def decimate(num: int, most: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return at most so many row indices, evenly spaced, the last row among them."""
    if num <= most:
        return np.arange(num)
    return np.unique(np.linspace(0, num - 1, most).astype(np.int64))


def binned(rows: Rows, num_bins: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return step, samples/s, and that of the slowest and the fastest rank, at most per bin.

    Samples over time, of a bin's steps or of the last `_RATE_STEPS` where it has
    fewer: an epoch's last batch is small, and not a slow step. The first step, which loads
    what the others find there, is left out.
    """
    if not rows.num or not rows.sums(np.array([rows.num]))[0, 0]:
        return (np.empty(0),) * 4
    first = min(1, rows.num - 1)
    num_bins = min(rows.num - first, num_bins)
    ends = np.unique(np.linspace(first, rows.num, num_bins + 1).astype(np.int64))[1:]
    starts = np.maximum(np.minimum(ends - _RATE_STEPS, np.append(first, ends[:-1])), first)
    samples, ms, low_ms, high_ms = rows.sums(ends) - rows.sums(starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate, low, high = 1000.0 * samples / ms, low_ms / ms, high_ms / ms
    return rows["step"][ends - 1], rate, np.minimum(low, rate), np.maximum(high, rate)


def median_of_known(table: Floats) -> Floats:
    """Return the medians along the last axis of what is not NaN; NaN where all is.

    As `numpy.nanmedian`, which takes ten times as long for many rows.
    """
    ordered = np.sort(table, axis=-1)  # NaN comes last
    num = (~np.isnan(table)).sum(axis=-1, keepdims=True)
    middle = [np.take_along_axis(ordered, at, -1) for at in (np.maximum(num - 1, 0) // 2, num // 2)]
    medians: Floats = (middle[0] + middle[1])[..., 0] / 2
    return medians
