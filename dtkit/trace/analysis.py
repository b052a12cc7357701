"""Where the time of a run goes, rank by rank: pure functions of the recorded rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtkit.trace.intervals import Intervals, clip, intersect, subtract, total, union
from dtkit.trace.match import match
from dtkit.trace.rows import PHASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dtkit.trace.match import Matched
    from dtkit.trace.rows import RankTrace, Step

__all__ = ["Analysis", "RankTimes", "Straggler", "analyse"]

_MS = 1e6
_NUM_WARM_UP = 2
"""First steps of a run, which load, compile and broadcast; left out where enough others are."""
_LEAST_EXPLAINED = 0.5
_COMPUTE = tuple(PHASES.index(name) for name in ("forward", "backward", "optimizer"))
_DATA, _COMMUNICATION = PHASES.index("data"), PHASES.index("communication")


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Mean milliseconds per step of one rank.

    `compute_ms`, `data_ms`, `exposed_ms` and `idle_ms` add up to `step_ms`.
    """

    rank: int
    step_ms: float
    compute_ms: float
    data_ms: float
    """Waiting for its own DataLoader."""
    exposed_ms: float
    """Waiting in communication, and doing nothing else."""
    idle_ms: float
    """Neither of these: printing, evaluation, whatever the cell does between steps."""
    overlapped_ms: float
    """Of `compute_ms`: while a collective was under way."""
    waited_ms: float
    """Of `exposed_ms`: before the last rank had joined."""

    @property
    def transfer_ms(self) -> float:
        """Of `exposed_ms`: after all ranks had joined."""
        return self.exposed_ms - self.waited_ms


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that others waited for."""

    rank: int
    waited_ms: float
    """How long each other rank waited for it, mean per step."""
    share: float
    """Of the step, 0 to 1."""
    last_share: float
    """In how many of the collectives it was the last to join, 0 to 1."""
    cause: str
    """data, compute or idle: in what it differs most from the others; empty: in nothing that
    explains half of the wait, so that it was late by chance."""
    excess_ms: float
    """How much longer it spends in that than the median of the others, per step."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a timeline says."""

    num_steps: int
    step_ms: float
    ranks: tuple[RankTimes, ...]
    stragglers: tuple[Straggler, ...]
    """Everyone that was waited for, longest first."""
    sent_bytes: float
    """That each rank handed to collectives, mean per step."""
    bandwidth: float
    """Bytes per second of a rank in collectives that all ranks had joined; 0: not known."""

    def share(self, name: str) -> float:
        """Return the mean share of the step, 0 to 1, of `compute`, `exposed` and so on."""
        if not self.step_ms:
            return 0.0
        return statistics.fmean(getattr(r, f"{name}_ms") for r in self.ranks) / self.step_ms


def analyse(traces: Sequence[RankTrace]) -> Analysis | None:
    """Return where the time of the steps goes that all ranks have; None if there are none."""
    by_rank = {t.head.rank: {s.number: s for s in t.steps} for t in traces}
    numbers = sorted(set.intersection(*map(set, by_rank.values()))) if by_rank else []
    numbers = [n for n in numbers if n > _NUM_WARM_UP] or numbers
    if not numbers:
        return None
    kept = {rank: [steps[n] for n in numbers] for rank, steps in by_rank.items()}
    windows = {rank: _exposed(steps) for rank, steps in kept.items()}
    matched = _within(match(traces), kept)
    waits = _waits(windows, matched)
    times = tuple(
        _times(rank, steps, windows[rank], sum(waits[rank].values()))
        for rank, steps in sorted(kept.items())
    )
    step_ms = statistics.fmean(t.step_ms for t in times)
    num_bytes, seconds = _traffic(matched)
    return Analysis(
        num_steps=len(numbers),
        step_ms=step_ms,
        ranks=times,
        stragglers=_stragglers(times, waits, matched, len(numbers)),
        sent_bytes=num_bytes / len(numbers),
        bandwidth=num_bytes / seconds if seconds else 0.0,
    )


def _exposed(steps: Sequence[Step]) -> Intervals:
    return union(
        (s.start_ns, s.end_ns) for step in steps for s in step.spans if s.phase == _COMMUNICATION
    )


def _within(matched: Sequence[Matched], kept: dict[int, list[Step]]) -> list[Matched]:
    """Return the collectives that belong to the steps."""
    begin = {rank: steps[0].start_ns for rank, steps in kept.items()}
    end = {rank: steps[-1].end_ns for rank, steps in kept.items()}
    return [
        m
        for m in matched
        if all(begin[rank] <= part.call_ns <= end[rank] for rank, part in m.parts.items())
    ]


def _waits(windows: dict[int, Intervals], matched: Sequence[Matched]) -> dict[int, dict[int, int]]:
    """Return for how many nanoseconds each rank waited for each other, idle in communication.

    Collectives of a rank are served in their order. While it waits for one that
    not all ranks have joined, it waits for the last of them.
    """
    waits: dict[int, dict[int, int]] = {rank: defaultdict(int) for rank in windows}
    served = dict.fromkeys(windows, 0)
    index = dict.fromkeys(windows, 0)
    for found in matched:
        last = found.last_rank
        for rank, part in found.parts.items():
            until = min(found.start_ns, part.done_ns or found.start_ns)
            if rank != last:
                window, index[rank] = _around(windows[rank], index[rank], served[rank], until)
                waits[rank][last] += total(clip(window, served[rank], until))
            served[rank] = max(served[rank], part.done_ns)
    return waits


def _around(window: Intervals, first: int, start: int, end: int) -> tuple[Intervals, int]:
    """Return the intervals that may meet [start, end], and where to look from next time."""
    while first < len(window) and window[first][1] <= start:
        first += 1
    last = first
    while last < len(window) and window[last][0] < end:
        last += 1
    return window[first:last], first


def _times(rank: int, steps: Sequence[Step], exposed: Intervals, waited_ns: int) -> RankTimes:
    sums = dict.fromkeys(("step", "compute", "data", "exposed", "overlapped"), 0)
    first = 0
    for step in steps:
        near, first = _around(exposed, first, step.start_ns, step.end_ns)
        away = clip(near, step.start_ns, step.end_ns)
        data = _of_phases(step, (_DATA,), away)
        compute = _of_phases(step, _COMPUTE, union([*away, *data]))
        flying = union((c.call_ns, c.done_ns) for c in step.collectives)
        sums["step"] += step.end_ns - step.start_ns
        sums["exposed"] += total(away)
        sums["data"] += total(data)
        sums["compute"] += total(compute)
        sums["overlapped"] += total(intersect(flying, compute))
    mean = {name: ns / _MS / len(steps) for name, ns in sums.items()}
    return RankTimes(
        rank=rank,
        step_ms=mean["step"],
        compute_ms=mean["compute"],
        data_ms=mean["data"],
        exposed_ms=mean["exposed"],
        idle_ms=mean["step"] - mean["compute"] - mean["data"] - mean["exposed"],
        overlapped_ms=mean["overlapped"],
        waited_ms=waited_ns / _MS / len(steps),
    )


def _of_phases(step: Step, phases: tuple[int, ...], without: Intervals) -> Intervals:
    spans = ((s.start_ns, s.end_ns) for s in step.spans if s.phase in phases)
    return subtract(clip(union(spans), step.start_ns, step.end_ns), without)


def _stragglers(
    times: Sequence[RankTimes],
    waits: dict[int, dict[int, int]],
    matched: Sequence[Matched],
    num_steps: int,
) -> tuple[Straggler, ...]:
    found = []
    for late in times:
        others = [t for t in times if t.rank != late.rank]
        waited_ns = [waits[t.rank].get(late.rank, 0) for t in others]
        if not any(waited_ns):
            continue
        waited_ms = statistics.fmean(waited_ns) / _MS / num_steps
        cause, excess_ms = _cause(late, others)
        if excess_ms < _LEAST_EXPLAINED * waited_ms:
            cause = ""
        num_last = sum(m.last_rank == late.rank for m in matched)
        step_ms = statistics.fmean(t.step_ms for t in times)
        found.append(
            Straggler(
                late.rank, waited_ms, waited_ms / step_ms, num_last / len(matched), cause, excess_ms
            )
        )
    return tuple(sorted(found, key=lambda s: -s.waited_ms))


def _cause(late: RankTimes, others: Iterable[RankTimes]) -> tuple[str, float]:
    """Return in what a rank spends most more than the others, and how much more."""
    excess = {
        name: getattr(late, f"{name}_ms")
        - statistics.median(getattr(t, f"{name}_ms") for t in others)
        for name in ("data", "compute", "idle")
    }
    cause = max(excess, key=lambda name: excess[name])
    return cause, excess[cause]


def _traffic(matched: Sequence[Matched]) -> tuple[float, float]:
    """Return the bytes of a rank in all collectives, and the seconds that any was under way."""
    num_bytes = sum(max(p.num_bytes for p in m.parts.values()) for m in matched)
    flying = union((m.start_ns, m.end_ns) for m in matched)
    return float(num_bytes), total(flying) / 1e9
