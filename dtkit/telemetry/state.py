"""RunState: takes the events of all ranks, merges them by step, answers with views."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from dtkit.events import (
    STEP_COLUMNS,
    Event,
    LogBatch,
    Note,
    RankEnded,
    RankStarted,
    StepBatch,
    Total,
)
from dtkit.telemetry.history import History
from dtkit.telemetry.view import MAX_POINTS, RankView, RunView

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["RunState"]

_WINDOW = 8192
"""Steps kept per rank; a rank may fall this far behind before its row is merged without it."""
_RECENT_STEPS = 50
_RECENT_S = 2.0
_GIB = 2**30
_SMOOTHING = 0.95
_ROW = ("step", "time_s", "loss", "smooth", "samples", "step_ms", "data_ms", "comm_ms", "lr",
        "rate_low", "rate_high")  # fmt: skip


class _Rank:
    """Newest state of one rank, and a ring of its last `_WINDOW` steps."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.host = self.device = ""
        self.pid = 0
        self.state = "starting"
        self.step = 0
        self.peak_bytes = 0
        self.ring: Floats = np.full((len(STEP_COLUMNS), _WINDOW), np.nan)

    def is_over(self) -> bool:
        return self.state in ("finished", "stopped", "failed", "lost")

    def add(self, batch: StepBatch) -> None:
        block = np.array([batch.columns[name] for name in STEP_COLUMNS], dtype=np.float64)
        slots = (block[0].astype(np.int64) - 1) % _WINDOW
        self.ring[:, slots] = block
        self.step = max(self.step, int(block[0].max()))
        self.peak_bytes = max(self.peak_bytes, batch.peak_bytes)

    def rows(self, steps: NDArray[np.int64]) -> Floats:
        """Return (num_columns, num_steps); columns of steps that are not here are NaN."""
        block = self.ring[:, (steps - 1) % _WINDOW].copy()
        block[:, block[0] != steps] = np.nan
        return block

    def recent(self) -> dict[str, float]:
        if not self.step:
            return {}
        steps = np.arange(max(1, self.step - _RECENT_STEPS + 1), self.step + 1)
        block = self.rows(steps)
        block = block[:, ~np.isnan(block[0])]
        medians = dict(zip(STEP_COLUMNS, np.median(block, axis=1), strict=True))
        medians["rate"] = _rate(block[STEP_COLUMNS.index("samples")].sum(),
                                block[STEP_COLUMNS.index("step_ms")].sum())  # fmt: skip
        return medians


class _Rows:
    """A growing table of merged steps, one row each."""

    def __init__(self) -> None:
        self._data: Floats = np.empty((len(_ROW), 1024))
        self.num = 0

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


class RunState:
    """Everything known of one run.

    Safe to feed from one thread and to read from another.

    Args:
        name: the run's name.
        ranks: the ranks that take part.
        recipe: the recipe as typed.
        start_unix_s: when it started, seconds since the epoch.
    """

    def __init__(
        self, name: str, ranks: Iterable[int], recipe: str = "", start_unix_s: float | None = None
    ) -> None:
        self.name = name
        self.recipe = recipe
        self.start_unix_s = time.time() if start_unix_s is None else start_unix_s
        self.state = "starting"
        self.error: str | None = None
        self._lock = threading.Lock()
        self._ranks = {rank: _Rank(rank) for rank in sorted(ranks)}
        self._rows = _Rows()
        self._merged_step = 0
        self._smooth = _Smoother(_SMOOTHING)
        self._best_loss = math.inf
        self._total_steps: int | None = None
        self._notes: list[str] = []
        self._logged: dict[str, dict[int, tuple[float, int]]] = {}
        self._log_time_s: dict[int, float] = {}
        self._end_unix_s: float | None = None
        self._arrivals: deque[tuple[float, float]] = deque()

    def handle(self, event: Event) -> None:
        """Take one event in."""
        with self._lock:
            self._apply(event)

    def end(self, state: str, error: str | None = None) -> None:
        """Close the run as finished, stopped or failed; nothing is merged after it."""
        with self._lock:
            for rank in self._ranks.values():
                if not rank.is_over():
                    rank.state = state
            self._merge()
            self.state, self.error = state, error
            self._end_unix_s = time.time()

    def set_rank_state(self, rank: int, state: str) -> None:
        """Record what the driver learnt about a rank, e.g. that it was lost."""
        with self._lock:
            self._ranks[rank].state = state

    def view(self) -> RunView:
        """Return the run as it is now."""
        with self._lock:
            return self._view()

    def history(self) -> History:
        """Return every merged step; a copy, so it does not change under the reader."""
        with self._lock:
            return self._history()

    @property
    def num_samples(self) -> float:
        """Samples seen by all ranks together in the merged steps."""
        with self._lock:
            return float(np.nansum(self._rows["samples"]))

    def _apply(self, event: Event) -> None:
        if isinstance(event, StepBatch):
            if event.columns["step"]:
                self._ranks[event.rank].add(event)
                self._merge()
            else:
                rank = self._ranks[event.rank]
                rank.peak_bytes = max(rank.peak_bytes, event.peak_bytes)
        elif isinstance(event, LogBatch):
            for step, time_s, metrics in zip(event.step, event.time_s, event.metrics, strict=True):
                self._log_time_s[step] = time_s
                for name, value in metrics.items():
                    total, count = self._logged.setdefault(name, {}).get(step, (0.0, 0))
                    self._logged[name][step] = (total + value, count + 1)
        elif isinstance(event, Total):
            self._total_steps = event.num_steps
        elif isinstance(event, Note):
            if event.text not in self._notes:
                self._notes.append(event.text)
        elif isinstance(event, RankStarted):
            rank = self._ranks[event.rank]
            rank.pid, rank.host, rank.device = event.pid, event.host, event.device
            rank.state = "running"
            if self.state == "starting":
                self.state = "running"
        elif isinstance(event, RankEnded):
            self._ranks[event.rank].state = event.state
            self._merge()

    def _merge(self) -> None:
        """Turn steps that every rank has finished into rows."""
        ranks = list(self._ranks.values())
        waiting = [r.step for r in ranks if not r.is_over()]
        furthest = max(r.step for r in ranks)
        done = min(waiting) if waiting else furthest
        done = max(done, furthest - _WINDOW)
        if done <= self._merged_step:
            return
        steps = np.arange(max(self._merged_step, done - _WINDOW) + 1, done + 1)
        self._merged_step = done
        block = np.stack([r.rows(steps) for r in ranks])  # (num_ranks, num_columns, num_steps)
        block = block[:, :, ~np.isnan(block[:, 0, :]).all(axis=0)]
        if block.shape[2]:
            self._rows.extend(self._merged_rows(block))
            if math.isfinite(self._smooth.value):
                self._best_loss = min(self._best_loss, float(np.nanmin(
                    np.append(self._rows["smooth"][-block.shape[2] :], math.inf))))  # fmt: skip
            self._note_arrival()

    def _merged_rows(self, block: Floats) -> Floats:
        column = {name: block[:, i, :] for i, name in enumerate(STEP_COLUMNS)}
        samples, loss = column["samples"], column["loss"]
        # A rank whose batch size is unknown counts like the others; a rank that
        # trained on nothing in this step (samples 0 while others have some) does not count.
        weight = np.where(np.nansum(samples, axis=0) > 0, samples, 1.0)
        weight = np.where(np.isnan(column["step"]) | _unseen(loss), 0.0, weight)
        total = weight.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_loss = np.where(weight > 0, weight * loss, 0.0).sum(axis=0) / total
            step_ms = np.nanmean(column["step_ms"], axis=0)
            rates = 1000.0 * samples / column["step_ms"] * np.sum(~np.isnan(samples), axis=0)
        return np.stack([
            np.nanmax(column["step"], axis=0),
            np.nanmax(column["time_s"], axis=0),
            mean_loss,
            self._smooth.extend(mean_loss),
            np.nansum(samples, axis=0),
            step_ms,
            np.nanmean(column["data_ms"], axis=0),
            np.nanmean(column["comm_ms"], axis=0),
            np.nanmax(column["lr"], axis=0, initial=-np.inf, where=~np.isnan(column["lr"])),
            np.nanmin(rates, axis=0),
            np.nanmax(rates, axis=0),
        ])  # fmt: skip

    def _note_arrival(self) -> None:
        now_s = float(self._rows["time_s"][-1])
        self._arrivals.append((now_s, float(np.nansum(self._rows["samples"]))))
        while len(self._arrivals) > 2 and self._arrivals[1][0] < now_s - _RECENT_S:
            self._arrivals.popleft()

    def _recent_rate(self) -> float:
        if len(self._arrivals) < 2:  # noqa: PLR2004  two points make a rate
            return _rate(np.nansum(self._rows["samples"]), np.nansum(self._rows["step_ms"]))
        (t0, n0), (t1, n1) = self._arrivals[0], self._arrivals[-1]
        return _rate(n1 - n0, 1000.0 * (t1 - t0))

    def _view(self) -> RunView:
        rows = self._rows
        tail = slice(-_RECENT_STEPS, None)
        step_ms = _median(rows["step_ms"][tail])
        elapsed_s = (self._end_unix_s or time.time()) - self.start_unix_s
        keep = _decimate(rows.num)
        rate = _binned(rows, MAX_POINTS // 2)
        return RunView(
            name=self.name,
            state=self.state,
            recipe=self.recipe,
            elapsed_s=elapsed_s,
            eta_s=self._eta_s(step_ms),
            step=self._merged_step,
            total_steps=self._total_steps,
            loss=_last(rows["smooth"]),
            best_loss=self._best_loss if math.isfinite(self._best_loss) else math.nan,
            samples_per_s=self._recent_rate(),
            step_ms=step_ms,
            data_share=_share(rows["data_ms"][tail], rows["step_ms"][tail]),
            comm_share=_share(rows["comm_ms"][tail], rows["step_ms"][tail]),
            peak_gib=max(r.peak_bytes for r in self._ranks.values()) / _GIB or math.nan,
            lr=_last(rows["lr"]),
            metrics={name: _newest(values) for name, values in self._logged.items()},
            loss_step=rows["step"][keep],
            loss_raw=rows["loss"][keep],
            loss_smooth=rows["smooth"][keep],
            rate_step=rate[0],
            rate=rate[1],
            rate_low=rate[2],
            rate_high=rate[3],
            ranks=tuple(self._rank_view(r) for r in self._ranks.values()),
            notes=tuple(self._notes),
            error=self.error,
        )

    def _eta_s(self, step_ms: float) -> float:
        if self._total_steps is None or math.isnan(step_ms) or self._end_unix_s:
            return math.nan
        # What a step costs including what happens between steps (evaluation):
        # the whole time so far over the steps so far, not the median step.
        pace_s = _last(self._rows["time_s"]) / max(self._merged_step, 1)
        return max(0.0, (self._total_steps - self._merged_step) * pace_s)

    def _rank_view(self, rank: _Rank) -> RankView:
        recent = rank.recent()
        step_ms = recent.get("step_ms", math.nan)
        data_ms, comm_ms = recent.get("data_ms", math.nan), recent.get("comm_ms", math.nan)
        return RankView(
            rank=rank.rank,
            host=rank.host,
            device=rank.device,
            pid=rank.pid,
            state=rank.state,
            step=rank.step,
            step_ms=step_ms,
            compute_ms=max(0.0, step_ms - data_ms - comm_ms),
            data_ms=data_ms,
            comm_ms=comm_ms,
            samples_per_s=recent.get("rate", math.nan),
            peak_gib=rank.peak_bytes / _GIB or math.nan,
        )

    def _history(self) -> History:
        rows = self._rows
        steps = rows["step"].copy()
        extra = sorted(set(self._log_time_s) - set(steps.astype(int)))
        order = np.argsort(np.concatenate([steps, extra]), kind="stable")

        def column(values: Floats, at_extra: list[float] | None = None) -> Floats:
            tail = np.full(len(extra), np.nan) if at_extra is None else np.array(at_extra)
            merged: Floats = np.concatenate([values, tail])[order]
            return merged

        with np.errstate(invalid="ignore", divide="ignore"):
            rate = np.where(rows["samples"] > 0, 1000.0 * rows["samples"] / rows["step_ms"], np.nan)
        columns = {
            "step": column(steps, [float(s) for s in extra]),
            "time_s": column(rows["time_s"], [self._log_time_s[s] for s in extra]),
            "loss": column(rows["loss"]),
            "samples_per_s": column(rate),
            "step_ms": column(rows["step_ms"]),
            "compute_ms": column(rows["step_ms"] - rows["data_ms"] - rows["comm_ms"]),
            "data_ms": column(rows["data_ms"]),
            "comm_ms": column(rows["comm_ms"]),
            "lr": column(rows["lr"]),
        }
        at = {int(step): i for i, step in enumerate(columns["step"])}
        for name, values in self._logged.items():
            logged = np.full(len(at), np.nan)
            for step, (total, count) in values.items():
                logged[at[step]] = total / count
            columns[name if name not in columns else f"logged_{name}"] = logged
        return History(columns)


class _Smoother:
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


def _unseen(loss: Floats) -> NDArray[np.bool_]:
    """Return where a rank reported no loss while another rank did.

    A NaN on every rank is a loss that really is NaN, or was never seen: it stays.
    """
    missing = np.isnan(loss)
    return missing & ~missing.all(axis=0)


def _rate(samples: float, ms: float) -> float:
    return float(1000.0 * samples / ms) if ms > 0 and samples > 0 else math.nan


def _median(values: Floats) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _last(values: Floats) -> float:
    return float(values[-1]) if len(values) else math.nan


def _newest(values: dict[int, tuple[float, int]]) -> float:
    total, count = values[max(values)]
    return total / count


def _share(part: Floats, whole: Floats) -> float:
    return float(part.sum() / whole.sum()) if len(whole) and whole.sum() > 0 else math.nan


def _decimate(num: int) -> NDArray[np.int64]:
    """Return at most `MAX_POINTS` row indices, evenly spaced, the last row among them."""
    if num <= MAX_POINTS:
        return np.arange(num)
    return np.unique(np.linspace(0, num - 1, MAX_POINTS).astype(np.int64))


def _binned(rows: _Rows, num_bins: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return step, rate, low and high per bin: samples over time, so that bins weigh rightly."""
    if not rows.num or not np.nansum(rows["samples"]):
        return (np.empty(0),) * 4
    edges = np.unique(np.linspace(0, rows.num, min(rows.num, num_bins) + 1).astype(np.int64))[:-1]
    samples = np.add.reduceat(np.nan_to_num(rows["samples"]), edges)
    ms = np.add.reduceat(np.nan_to_num(rows["step_ms"]), edges)
    count = np.diff(np.append(edges, rows.num))
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(ms > 0, 1000.0 * samples / ms, np.nan)
    low = np.add.reduceat(np.nan_to_num(rows["rate_low"]), edges) / count
    high = np.add.reduceat(np.nan_to_num(rows["rate_high"]), edges) / count
    return rows["step"][edges], rate, np.minimum(low, rate), np.maximum(high, rate)
