"""Series of a run: a ring per rank, a growing table of merged steps, and what is drawn of them."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import STEP_COLUMNS
from dtkit.telemetry.view import MAX_POINTS, RankView

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dtkit.events import GpuUse, StepBatch

    Floats = NDArray[np.float64]

__all__ = ["WINDOW", "Arrivals", "RankSeries", "Rows", "Smoother", "binned", "decimate", "last",
           "mean", "median", "rate_of", "share", "smoothed"]  # fmt: skip

WINDOW = 8192
"""Steps kept per rank; a rank may fall this far behind before its row is merged without it."""
_RECENT_STEPS = 50
_RECENT_S = 2.0
_GIB = 2**30
_RATE_STEPS = 16
_ROW = ("step", "time_s", "loss", "smooth", "samples", "step_ms", "data_ms", "comm_ms", "lr",
        "rate_low", "rate_high", "sent_bytes", "raw_bytes")  # fmt: skip


class RankSeries:
    """Newest state of one rank, and a ring of its last `WINDOW` steps."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.host = self.device = ""
        self.pid = 0
        self.state = "starting"
        self.step = 0
        self.peak_bytes = 0
        self.end_s = math.inf
        self.last_s = 0.0
        self._recent: tuple[int, dict[str, float]] = (0, {})
        self.ring: Floats = np.full((len(STEP_COLUMNS), WINDOW), np.nan)
        self.gpu: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        """Step, part of the time that the GPU was busy, in percent, and GiB taken of it."""

    def is_over(self) -> bool:
        return self.state in ("finished", "stopped", "failed", "lost")

    def add(self, batch: StepBatch) -> None:
        self.peak_bytes = max(self.peak_bytes, batch.peak_bytes)
        if not batch.columns["step"]:
            return
        # A run that an older dtkit stored may lack a column.
        unknown = [math.nan] * len(batch.columns["step"])
        block = np.array([batch.columns.get(name, unknown) for name in STEP_COLUMNS])
        slots = (block[0].astype(np.int64) - 1) % WINDOW
        self.ring[:, slots] = block
        self.step = max(self.step, int(block[0].max()))
        self.last_s = max(self.last_s, float(block[1].max()))

    def use_gpu(self, use: GpuUse) -> None:
        self.gpu.append((use.step, use.busy_percent, use.used_bytes / _GIB))

    def rows(self, steps: NDArray[np.int64]) -> Floats:
        """Return (num_columns, num_steps); columns of steps that are not here are NaN."""
        block = self.ring[:, (steps - 1) % WINDOW].copy()
        block[:, block[0] != steps] = np.nan
        return block

    def recent(self) -> dict[str, float]:
        if self._recent[0] != self.step:  # it is asked for more often than steps come
            self._recent = (self.step, self._summed_up())
        return self._recent[1]

    def _summed_up(self) -> dict[str, float]:
        steps = np.arange(max(1, self.step - _RECENT_STEPS + 1), self.step + 1)
        block = self.rows(steps)
        block = block[:, ~np.isnan(block[0])]
        medians = dict(zip(STEP_COLUMNS, np.median(block, axis=1), strict=True))
        medians["rate"] = rate_of(block[STEP_COLUMNS.index("samples")].sum(),
                                block[STEP_COLUMNS.index("step_ms")].sum())  # fmt: skip
        return medians

    def view(self) -> RankView:
        recent = self.recent()
        step_ms = recent.get("step_ms", math.nan)
        data_ms, comm_ms = recent.get("data_ms", math.nan), recent.get("comm_ms", math.nan)
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
            samples_per_s=recent.get("rate", math.nan),
            peak_gib=self.peak_bytes / _GIB or math.nan,
            gpu_percent=self.gpu[-1][1] if self.gpu else math.nan,
            gpu_gib=self.gpu[-1][2] if self.gpu else math.nan,
        )


class Rows:
    """A growing table of merged steps, one row each."""

    names = _ROW

    def __init__(self) -> None:
        self._data: Floats = np.empty((len(_ROW), 1024))
        self.num: int = 0

    def extend(self, block: Floats) -> None:
        needed = self.num + block.shape[1]
        if needed > self._data.shape[1]:
            grown = np.empty((len(_ROW), max(needed, 2 * self._data.shape[1])))
            grown[:, : self.num] = self._data[:, : self.num]
            self._data = grown
        self._data[:, self.num : needed] = block
        self.num = needed

    def __getitem__(self, name: str) -> Floats:
        return self._data[_ROW.index(name), : self.num]


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


class Arrivals:
    """When samples came, lately: for a rate that follows what happens now."""

    def __init__(self) -> None:
        self.num_samples = 0.0
        self._points: deque[tuple[float, float]] = deque()  # seconds, and samples so far

    def add(self, rows: Rows, num_samples: float) -> None:
        """Note that rows have come, with so many samples in them."""
        if not self._points:
            first_s = rows["time_s"][0] - rows["step_ms"][0] / 1000  # when the first step began
            self._points.append((float(first_s), 0.0))
        self.num_samples += num_samples
        now_s = float(rows["time_s"][-1])
        self._points.append((now_s, self.num_samples))
        # Two are kept, whatever their age: a rate lies between two points.
        while self._points[1][0] < now_s - _RECENT_S:
            self._points.popleft()

    def rate(self) -> float:
        """Return samples/s of the last seconds."""
        if not self._points:
            return math.nan
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        return rate_of(n1 - n0, 1000.0 * (t1 - t0))


def rate_of(samples: float, ms: float) -> float:
    return float(1000.0 * samples / ms) if ms > 0 and samples > 0 else math.nan


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
    fewer: an epoch's last batch is small, and not a slow step.
    """
    if not rows.num or not np.nansum(rows["samples"]):
        return (np.empty(0),) * 4
    ends = np.unique(np.linspace(0, rows.num, min(rows.num, num_bins) + 1).astype(np.int64))[1:]
    starts = np.maximum(np.minimum(ends - _RATE_STEPS, np.append(0, ends[:-1])), 0)
    ms = rows["step_ms"]

    def total(values: Floats) -> Floats:
        sums = np.append(0.0, np.cumsum(np.nan_to_num(values)))
        within: Floats = sums[ends] - sums[starts]
        return within

    with np.errstate(invalid="ignore", divide="ignore"):
        rate = 1000.0 * total(rows["samples"]) / total(ms)
        low, high = (total(rows[name] * ms) / total(ms) for name in ("rate_low", "rate_high"))
    return rows["step"][ends - 1], rate, np.minimum(low, rate), np.maximum(high, rate)
