"""Rows of a timeline: what a rank writes of each step, and how it is read back.

A rank's file is JSON lines: a head, then one line per step, and a line of names
whenever tensors are met for the first time. A line that a kill cut short is
skipped. Times are nanoseconds of the rank's own monotonic clock in the file,
and of the first rank's once they have been read.
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "OPERATIONS",
    "PHASES",
    "Collective",
    "Head",
    "RankTrace",
    "Span",
    "Step",
    "Tensors",
    "encode_names",
    "encode_step",
    "part_path",
    "read_rank",
    "read_run",
]

PHASES = ("data", "forward", "backward", "communication", "optimizer")
"""communication: the rank waits for other ranks and does nothing else (exposed communication)."""

OPERATIONS = ("ALLREDUCE", "ALLGATHER", "BROADCAST", "REDUCESCATTER", "ALLTOALL", "BARRIER")
"""Horovod's names of collectives."""


class Span(NamedTuple):
    """A rank was in a phase."""

    phase: int
    """Index into `PHASES`."""
    start_ns: int
    end_ns: int


class Collective(NamedTuple):
    """One rank's part in one collective."""

    operation: int
    """Index into `OPERATIONS`."""
    group: int
    """Number of the group of ranks; see `RankTrace.groups`."""
    sequence: int
    """Its place among the group's collectives: the same on all ranks."""
    tensors: int
    """Number of its tensors' names; see `RankTrace.tensors`."""
    ready_ns: int
    """The rank's data was there."""
    call_ns: int
    """The rank handed it to the backend."""
    done_ns: int
    """The result was there; 0: not known."""
    out_start_ns: int
    """The rank began to take the result out of the buffer; 0: it did not."""
    out_end_ns: int
    num_bytes: int


_TIMES = ("ready_ns", "call_ns", "done_ns", "out_start_ns", "out_end_ns")


class Step(NamedTuple):
    """One step of one rank."""

    number: int
    start_ns: int
    end_ns: int
    spans: list[Span]
    collectives: list[Collective]


class Tensors(NamedTuple):
    """What one collective carries."""

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """First line of a rank's file.

    Attributes:
        offset_ns: to be added to this rank's clock to get the first rank's.
        error_ns: how far off that may be, as measured when the run began.
    """

    rank: int
    ranks: tuple[int, ...]
    host: str
    device: str
    backend: str
    start_unix_s: float
    start_ns: int
    offset_ns: int = 0
    error_ns: int = 0
    mark_cycles: bool = False

    def encode(self) -> bytes:
        """Return the head as a JSON line."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({"head": values}).encode() + b"\n"


class Clock(NamedTuple):
    """A later comparison of a rank's clock with the first rank's: clocks of hosts drift.

    Attributes:
        at_ns: when, on this rank's clock.
        offset_ns: to be added to it then.
        error_ns: how far off that may be.
    """

    at_ns: int
    offset_ns: int
    error_ns: int

    def encode(self) -> bytes:
        """Return it as a JSON line."""
        return json.dumps({"clock": self}).encode() + b"\n"


@dataclass(slots=True)
class RankTrace:
    """All that is known of one rank, its times on the first rank's clock.

    Attributes:
        head: what it said when it began.
        clock: how its clock compared at the end; None: one host, or it did not come to its end.
    """

    head: Head
    clock: Clock | None = None
    steps: list[Step] = field(default_factory=list)
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tensors: dict[int, Tensors] = field(default_factory=dict)

    def offset_ns(self, at_ns: int) -> int:
        """Return what to add at a time of this rank's clock: between two comparisons, linearly."""
        first_ns, start_ns = self.head.offset_ns, self.head.start_ns
        if self.clock is None or self.clock.at_ns <= start_ns:
            return first_ns
        share = (at_ns - start_ns) / (self.clock.at_ns - start_ns)
        return first_ns + round(share * (self.clock.offset_ns - first_ns))

    @property
    def error_ns(self) -> int:
        """How far off the offset may be, if clocks drift evenly."""
        return max(self.head.error_ns, self.clock.error_ns if self.clock else 0)


def names_of(traces: Iterable[RankTrace]) -> dict[int, str]:
    """Return what ranks are called: with their hosts, if there are several."""
    hosts = {trace.head.rank: trace.head.host for trace in traces}
    has_several = len(set(hosts.values())) > 1
    return {r: f"rank {r} on {host}" if has_several else f"rank {r}" for r, host in hosts.items()}


def encode_names(groups: dict[int, tuple[int, ...]], tensors: dict[int, Tensors]) -> bytes:
    """Return a line of names."""
    return json.dumps({"groups": groups, "tensors": tensors}).encode() + b"\n"


def encode_step(step: Iterable[Any]) -> bytes:  # Any: a Step, or a list of the same shape
    """Return a line of one step."""
    return json.dumps(step, separators=(",", ":")).encode() + b"\n"


def part_path(run_dir: Path, rank: int) -> Path:
    """Return where a rank writes its rows."""
    return run_dir / "timeline" / f"rank-{rank}.jsonl"


def read_run(run_dir: Path, last: int | None = None) -> list[RankTrace]:
    """Return what all ranks of a run wrote, by rank; empty if there is no timeline.

    Args:
        run_dir: the run's folder.
        last: so many steps at most, the last ones that any rank has made; None: all.
    """
    folder = run_dir / "timeline"
    ranks = sorted({int(path.name.split(".")[0][5:]) for path in folder.glob("rank-*.jsonl*")})
    traces = [trace for rank in ranks if (trace := read_rank(part_path(run_dir, rank), last))]
    newest = max((trace.steps[-1].number for trace in traces if trace.steps), default=0)
    for trace in traces:
        if last is not None:
            trace.steps = [step for step in trace.steps if step.number > newest - last]
    return traces


def read_rank(path: Path, last: int | None = None) -> RankTrace | None:
    """Return what a rank wrote, None if it did not come to its first line."""
    trace: RankTrace | None = None
    steps: deque[list[Any]] = deque(maxlen=last)
    for row in _rows(path):
        if isinstance(row, list):
            steps.append(row)
        elif "head" in row:
            head = row["head"]
            trace = trace or RankTrace(Head(**{**head, "ranks": tuple(head["ranks"])}))
        elif "clock" in row and trace is not None:
            trace.clock = Clock(*row["clock"])
        elif trace is not None:
            trace.groups |= {int(k): tuple(v) for k, v in row["groups"].items()}
            trace.tensors |= {
                int(k): Tensors(tuple(names), dtype, tuple(shape))
                for k, (names, dtype, shape) in row["tensors"].items()
            }
    if trace is not None:
        trace.steps = [_step(row, trace.offset_ns(row[1])) for row in steps]
    return trace


def _rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a rank: of the file that was full, then of the newest."""
    zipped = path.with_name(path.name + ".gz")
    for candidate in (path.with_name(path.name + ".1"), zipped, path):
        try:
            data = candidate.read_bytes()
        except FileNotFoundError:
            continue
        if candidate is zipped:
            data = gzip.decompress(data)
        for line in data.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # cut short by a kill


def _step(row: list[Any], offset_ns: int) -> Step:
    number, start_ns, end_ns, spans, collectives = row
    step = Step(
        number, start_ns, end_ns,
        list(map(Span._make, spans)), list(map(Collective._make, collectives)),
    )  # fmt: skip
    return _shifted(step, offset_ns) if offset_ns else step


def _shifted(step: Step, by_ns: int) -> Step:
    return Step(
        step.number,
        step.start_ns + by_ns,
        step.end_ns + by_ns,
        [Span(phase, start + by_ns, end + by_ns) for phase, start, end in step.spans],
        [
            part._replace(
                **{name: getattr(part, name) + by_ns for name in _TIMES if getattr(part, name)}
            )
            for part in step.collectives
        ],
    )
