"""RunState: takes the events of all ranks, merges them by step, answers with views."""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dtkit.events import (
    ControlDeclared,
    ControlsChanged,
    Event,
    GpuUse,
    LogBatch,
    Note,
    RankStarted,
    StepBatch,
    Total,
)
from dtkit.telemetry._order import InStep, InTime, Order
from dtkit.telemetry._rate import Arrivals, rate_of_all
from dtkit.telemetry._series import (
    WINDOW,
    RankSeries,
    Rows,
    Smoother,
    last,
    mean,
    median,
    new_rings,
    recent_of,
    share,
)
from dtkit.telemetry.controls import ControlsState
from dtkit.telemetry.curves import curves_of, loss_curve, rate_curve
from dtkit.telemetry.history import History, history_of
from dtkit.telemetry.logged import Logged
from dtkit.telemetry.news import News, metrics_within, newest, rows_from
from dtkit.telemetry.view import ControlChange, Curve, RunView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from dtkit.livecontrol import LiveControl

    Floats = NDArray[np.float64]

__all__ = ["RunState"]

_RECENT_STEPS = 50
_GIB = 2**30
_SMOOTHING = 0.95
_MAX_NEW = WINDOW // 4
"""Steps of a rank that may wait to be made rows of the run: its ring holds the last `WINDOW`."""


class RunState:
    """Everything known of one run.

    Safe to feed from one thread and to read from another.

    Args:
        name: the run's name.
        ranks: the ranks that take part.
        recipe: the recipe as typed.
        start_unix_s: when it started, seconds since the epoch.
        is_free: whether its ranks make steps without waiting for each other.
    """

    def __init__(
        self, name: str, ranks: Iterable[int], recipe: str = "", start_unix_s: float | None = None,
        *, is_free: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.recipe = recipe
        self.start_unix_s: float = time.time() if start_unix_s is None else start_unix_s
        self.state: str = "starting"
        self.stall: str = ""
        self.error: str | None = None
        self.summaries: tuple[dict[str, Any], ...] = ()
        self._lock = threading.Lock()
        numbers = sorted(ranks)
        self._rings = new_rings(len(numbers))
        self._ranks = {rank: RankSeries(rank, self._rings[i]) for i, rank in enumerate(numbers)}
        self._rows = Rows()
        self._smooth = Smoother(_SMOOTHING)
        self._is_free = is_free
        order = InTime if is_free else InStep
        self._order: Order = order(list(self._ranks.values()), self._rings, self._smooth)
        self._best_loss = math.inf
        self._total_steps: int | None = None
        self._notes: dict[str, None] = {}
        self._logged = Logged(
            self._rows, lambda rank, step: self._ranks[rank].ended_s(step), is_free=is_free
        )
        self._end_unix_s: float | None = None
        self._arrivals = Arrivals()
        self._controls = ControlsState()

    def handle(self, event: Event) -> None:
        """Take one event in."""
        with self._lock:
            self._apply(event)

    def end(self, state: str, error: str | None = None, end_unix_s: float | None = None) -> None:
        """Close the run as finished, stopped or failed, now or when its ranks ended."""
        with self._lock:
            for rank in self._ranks.values():
                # Whom the user interrupted, and whom that freed, has not failed.
                if not rank.is_over() or (state == "stopped" and rank.state == "failed"):
                    rank.state = state
            self._merge()
            self.state, self.error = state, error
            ended_unix_s = self.start_unix_s + max(r.end_s for r in self._ranks.values())
            self._end_unix_s = end_unix_s or min(ended_unix_s, time.time())

    def set_rank_state(self, rank: int, state: str) -> None:
        """Record what the driver learnt about a rank, e.g. that it was lost."""
        with self._lock:
            self._ranks[rank].state = state

    def pace(self) -> tuple[float, float]:
        """Return how long no step has ended, in seconds, and the median step, in ms."""
        with self._merged():
            last_unix_s = self.start_unix_s + last(self._rows["time_s"])
            return time.time() - last_unix_s, median(self._rows["step_ms"][-_RECENT_STEPS:])

    def view(self) -> RunView:
        """Return the run as it is now."""
        with self._merged():
            return self._view()

    def history(self) -> History:
        """Return every merged step; a copy, so it does not change under the reader."""
        with self._merged():
            controls = self._controls.columns(self._rows["step"], self._changes())
            return history_of(self._rows, self._logged.values, self._logged.time_s, controls)

    def news(self, first_row: int, low: int, high: int | None) -> News:
        """Return the rows from `first_row` on, and metrics of steps above `low` and up to `high`.

        Metrics of the newest steps may still lack a rank's; `high` None asks for them all.
        """
        with self._merged():
            return News(
                rows=rows_from(self._rows, first_row),
                metrics=metrics_within(self._logged.values, self._logged.time_s, low, high),
                peaks_gib={r.rank: r.peak_bytes / _GIB for r in self._ranks.values()},
                step=self._order.step,
                time_s=(self._end_unix_s or time.time()) - self.start_unix_s,
            )

    def curves(self) -> dict[str, Curve]:
        """Return what can be drawn of the run so far, each at most `MAX_POINTS` points."""
        with self._merged():
            return curves_of(self._rows, self._logged.values, list(self._ranks.values()))

    @property
    def controls(self) -> dict[str, LiveControl]:
        """The live controls of the run, by name."""
        with self._lock:
            return self._controls.declared

    @property
    def num_samples(self) -> float:
        """Samples seen by all ranks together in the merged steps."""
        with self._merged():
            return self._arrivals.num_samples

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Let nobody else in, and have the rows of all that has come."""
        with self._lock:
            self._merge()
            yield

    def _apply(self, event: Event) -> None:
        if isinstance(event, StepBatch):
            rank = self._ranks[event.rank]
            rank.add(event)
            if rank.num_new > _MAX_NEW:
                self._merge()
        elif isinstance(event, LogBatch):
            self._logged.take(event, is_over=self._is_over())
        elif isinstance(event, GpuUse):
            self._ranks[event.rank].use_gpu(event)
        elif isinstance(event, Total):
            self._total_steps = event.num_steps * (len(self._ranks) if self._is_free else 1)
        elif isinstance(event, Note):
            self._notes.setdefault(event.text)
        elif isinstance(event, RankStarted):
            self._start(event)
        elif isinstance(event, ControlDeclared | ControlsChanged):
            self._controls.take(event)
        else:
            self._ranks[event.rank].state = event.state
            self._ranks[event.rank].end_s = event.time_s
            self.summaries = (*self.summaries, event.summary)

    def _start(self, event: RankStarted) -> None:
        rank = self._ranks[event.rank]
        rank.pid, rank.host, rank.device = event.pid, event.host, event.device
        rank.state = "running"
        if self.state == "starting":
            self.state = "running"

    def _is_over(self) -> bool:
        return all(rank.is_over() for rank in self._ranks.values())

    def _changes(self) -> tuple[ControlChange, ...]:
        return self._controls.changes(self._logged.step_at if self._is_free else None)

    def _merge(self) -> None:
        """Turn steps into rows, as far as it is known what belongs to them.

        Done when somebody looks: of many ranks at once it costs hardly more than of one.
        """
        block = self._order.take()
        for rank in self._ranks.values():
            rank.num_new = 0
        if block.shape[1]:
            self._rows.extend(block)
            if math.isfinite(self._smooth.value):
                self._best_loss = min(self._best_loss, float(np.nanmin(
                    np.append(self._rows["smooth"][-block.shape[1] :], math.inf))))  # fmt: skip
            num_samples = float(np.nansum(self._rows["samples"][-block.shape[1] :]))
            self._arrivals.add(self._rows, num_samples)
        self._logged.settle(is_over=self._is_over())

    def _rate(self) -> float:
        """Return samples/s of the last seconds, and of the whole run once it has ended."""
        if not self._end_unix_s:
            return self._arrivals.rate()
        return rate_of_all(self._rows)

    def _view(self) -> RunView:
        rows = self._rows
        tail = slice(-_RECENT_STEPS, None)
        step_ms = median(rows["step_ms"][tail])
        elapsed_s = (self._end_unix_s or time.time()) - self.start_unix_s
        ranks = list(self._ranks.values())
        recent = recent_of(self._rings, [rank.step for rank in ranks]).tolist()
        return RunView(
            name=self.name,
            state=self.state,
            recipe=self.recipe,
            elapsed_s=elapsed_s,
            eta_s=self._eta_s(step_ms),
            step=self._order.step,
            total_steps=self._total_steps,
            loss=last(rows["smooth"]),
            best_loss=self._best_loss if math.isfinite(self._best_loss) else math.nan,
            samples_per_s=self._rate(),
            step_ms=step_ms,
            data_share=share(rows["data_ms"][tail], rows["step_ms"][tail]),
            comm_share=share(rows["comm_ms"][tail], rows["step_ms"][tail]),
            sent_bytes=mean(rows["sent_bytes"][tail]),
            raw_bytes=mean(rows["raw_bytes"][tail]),
            peak_gib=max(r.peak_bytes for r in ranks) / _GIB or math.nan,
            lr=last(rows["lr"]),
            metrics={name: newest(values) for name, values in self._logged.values.items()},
            loss_curve=loss_curve(rows),
            rate_curve=rate_curve(rows),
            ranks=tuple(r.view(now) for r, now in zip(ranks, recent, strict=True)),
            notes=tuple(self._notes),
            error=self.error,
            staleness=tuple(sorted(self._logged.staleness.items())),
            stall=self.stall if self.state == "running" else "",
            controls=self._controls.views(),
            changes=self._changes(),
        )

    def _eta_s(self, step_ms: float) -> float:
        if self._total_steps is None or math.isnan(step_ms) or self._end_unix_s:
            return math.nan
        # What a step costs including what happens between steps (evaluation):
        # the whole time so far over the steps so far, not the median step.
        pace_s = last(self._rows["time_s"]) / max(self._order.step, 1)
        return max(0.0, (self._total_steps - self._order.step) * pace_s)
