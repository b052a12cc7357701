"""One trace of all ranks, in the format of Chrome's tracing page and Perfetto.

Source: "Trace Event Format" (Google, 2016). Two views of the same run: a process
per rank with its phases, and, as in Horovod's timeline, a process per tensor with
NEGOTIATE_ALLREDUCE (a tick per rank as it becomes ready), ALLREDUCE and what is in
it. Times are microseconds since the first row.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dtkit.trace.intervals import union
from dtkit.trace.match import match
from dtkit.trace.rows import OPERATIONS, PHASES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from dtkit.trace.match import Matched
    from dtkit.trace.rows import Collective, RankTrace, Step, Tensors

__all__ = ["RANK_PID", "events", "write"]

RANK_PID = 1_000_000
"""Process number of rank 0; tensors count from 1, as Horovod's do."""
_MAX_TENSOR_ROWS = 200
"""Of more tensors each collective is one row, named by its first tensor and their number."""
_THREADS = ("step", *PHASES[:1], "compute", "communication", "collectives")
_THREAD_OF_PHASE = {"data": 1, "forward": 2, "backward": 2, "optimizer": 2, "communication": 3}
_COLLECTIVES = 4
_COMMUNICATION = PHASES.index("communication")


def write(traces: Sequence[RankTrace], path: Path) -> int:
    """Write the trace; the file is whole at every instant, whoever is killed meanwhile.

    Args:
        traces: of all ranks.
        path: the file; one that ends in `.gz` is compressed.

    Returns:
        The number of events.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = list(events(traces))
    text = (
        '{"displayTimeUnit":"ms","otherData":'
        + json.dumps(_about(traces))
        + ',"traceEvents":[\n'
        + ",\n".join(lines)
        + "\n]}\n"
    )
    data = text.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(gzip.compress(data, 3) if path.suffix == ".gz" else data)
    temporary.replace(path)
    return len(lines)


def events(traces: Sequence[RankTrace]) -> Iterator[str]:
    """Yield the events, each as JSON."""
    zero_ns = min((t.steps[0].start_ns for t in traces if t.steps), default=0)
    whole = match(traces)
    yield from _tensor_events(traces, whole, zero_ns)
    for trace in traces:
        yield from _rank_events(trace, zero_ns)


def _about(traces: Sequence[RankTrace]) -> dict[str, Any]:  # Any: JSON
    clocks = {
        str(t.head.rank): {
            "host": t.head.host,
            "offset_us": t.head.offset_ns / 1000,
            "error_us": t.error_ns / 1000,
            **({"drift_us": (t.clock.offset_ns - t.head.offset_ns) / 1000} if t.clock else {}),
        }
        for t in traces
    }
    is_compared_twice = any(t.clock for t in traces)
    when = "began and when it ended, and taken evenly between" if is_compared_twice else "began"
    return {
        "clock": f"the first rank's; each rank's offset was measured when the run {when}",
        "clocks": clocks,
        "error_us": max((t.error_ns for t in traces), default=0) / 1000,
    }


def _rank_events(trace: RankTrace, zero_ns: int) -> Iterator[str]:
    head = trace.head
    pid = RANK_PID + head.rank
    name = f"rank {head.rank} ({head.host}, {head.device})"
    yield _meta("process_name", pid, {"name": name})
    yield _meta("process_sort_index", pid, {"sort_index": head.rank - RANK_PID})
    for tid, title in enumerate(_THREADS):
        yield _meta("thread_name", pid, {"name": title}, tid)
        yield _meta("thread_sort_index", pid, {"sort_index": tid}, tid)
    for step in trace.steps:
        yield _span(f"step {step.number}", (pid, 0), step.start_ns - zero_ns, step.end_ns - zero_ns)
        if head.mark_cycles:
            at = _us(step.start_ns - zero_ns)
            yield f'{{"ph":"i","name":"CYCLE_START","pid":{pid},"tid":0,"ts":{at},"s":"g"}}'
        for thread, phase, start_ns, end_ns in _phases(step):
            yield _span(phase, (pid, thread), start_ns - zero_ns, end_ns - zero_ns)
    yield from _collective_events(trace, pid, zero_ns)


def _phases(step: Step) -> Iterator[tuple[int, str, int, int]]:
    """Yield thread, name, start and end of a step's phases; waits that overlap are one."""
    waits = [span[1:] for span in step.spans if span.phase == _COMMUNICATION]
    for start_ns, end_ns in union(waits):
        yield _THREAD_OF_PHASE["communication"], "communication", start_ns, end_ns
    for phase, start_ns, end_ns in step.spans:
        if phase != _COMMUNICATION:
            yield _THREAD_OF_PHASE[PHASES[phase]], PHASES[phase], start_ns, end_ns


def _collective_events(trace: RankTrace, pid: int, zero_ns: int) -> Iterator[str]:
    """Yield a rank's collectives, each on the first line where none is under way.

    Two that overlap without one being within the other cannot stand on one line:
    Perfetto drops the second.
    """
    free_ns: list[int] = []
    for part in sorted(_done(trace), key=lambda c: c.call_ns):
        lane = next((i for i, at_ns in enumerate(free_ns) if at_ns <= part.call_ns), len(free_ns))
        if lane == len(free_ns):
            free_ns.append(0)
            if lane:
                yield _meta("thread_name", pid, {"name": "collectives"}, _COLLECTIVES + lane)
        free_ns[lane] = part.done_ns
        tensors = trace.tensors[part.tensors]
        yield _span(
            f"{OPERATIONS[part.operation]} {_label(tensors)}", (pid, _COLLECTIVES + lane),
            part.call_ns - zero_ns, part.done_ns - zero_ns,
            f',"args":{{"bytes":{part.num_bytes},"tensors":{len(tensors.names)}}}',
        )  # fmt: skip


def _done(trace: RankTrace) -> Iterator[Collective]:
    for step in trace.steps:
        for part in step.collectives:
            if part.done_ns and part.tensors in trace.tensors:
                yield part


def _tensor_events(
    traces: Sequence[RankTrace], whole: Sequence[Matched], zero_ns: int
) -> Iterator[str]:
    """Yield Horovod's rows, from the collectives that are whole."""
    by_rank = {t.head.rank: t for t in traces}
    start_us = int(1e6 * by_rank[min(by_rank)].head.start_unix_s) if by_rank else 0
    yield _meta("process_name", 0, {"start_time_since_epoch_in_micros": start_us})
    yield _meta("process_sort_index", 0, {"sort_index": 0})
    num_names = sum(len(t.names) for trace in traces[:1] for t in trace.tensors.values())
    pids: dict[str, int] = {}
    ends: dict[str, int] = {}
    for matched in whole:
        if not matched.end_ns:
            continue
        trace = by_rank[min(matched.parts)]
        tensors = trace.tensors.get(matched.parts[trace.head.rank].tensors)
        if tensors is None:
            continue
        names = tensors.names if num_names <= _MAX_TENSOR_ROWS else (_label(tensors),)
        for name in names:
            if name not in pids:
                pids[name] = len(pids) + 1
                yield _meta("process_name", pids[name], {"name": name})
                yield _meta("process_sort_index", pids[name], {"sort_index": pids[name]})
            pid = pids[name]
            # A rank may be ready again before the first one has copied the last result.
            rows = _tensor_rows(matched, tensors, trace.head.backend, ends.get(name, 0))
            ends[name] = rows[-1].at_ns
            yield from (row.encode(pid, zero_ns) for row in rows)


class _Row(NamedTuple):
    """An event in the row of a tensor."""

    ph: str
    at_ns: int
    name: str = ""
    more: str = ""

    def encode(self, pid: int, zero_ns: int) -> str:
        name = f',"name":{_quoted(self.name)}' if self.name else ""
        at = _us(self.at_ns - zero_ns)
        return f'{{"ph":"{self.ph}"{name},"pid":{pid},"tid":0,"ts":{at}{self.more}}}'


def _tensor_rows(matched: Matched, tensors: Tensors, backend: str, after_ns: int) -> list[_Row]:
    """Return a collective's events in the row of one of its tensors, none before `after_ns`."""
    parts = matched.parts
    first = parts[min(parts)]
    operation = OPERATIONS[first.operation]
    readies = sorted((max(part.ready_ns, after_ns), rank) for rank, part in parts.items())
    ready_ns = readies[-1][0]
    start_ns = max(matched.start_ns, ready_ns)
    done_ns = max(matched.end_ns, start_ns)
    activities = [(f"{backend.upper()}_{operation}", start_ns, done_ns)]
    if len(tensors.names) > 1:
        activities.insert(0, ("MEMCPY_IN_FUSION_BUFFER", ready_ns, start_ns))
        if first.out_end_ns:
            out_ns = (max(done_ns, first.out_start_ns), max(done_ns, first.out_end_ns))
            activities.append(("MEMCPY_OUT_FUSION_BUFFER", *out_ns))
    rows = [_Row("B", readies[0][0], f"NEGOTIATE_{operation}")]
    rows += [_Row("X", at_ns, str(rank), ',"dur":0') for at_ns, rank in readies]
    rows += [_Row("E", ready_ns), _Row("B", ready_ns, operation)]
    for name, begin_ns, finish_ns in activities:
        rows += [_Row("B", begin_ns, name), _Row("E", finish_ns)]
    about = json.dumps({"dtype": tensors.dtype, "shape": str(list(tensors.shape))})
    return [*rows, _Row("E", rows[-1].at_ns, "", f',"args":{about}')]


def _label(tensors: Tensors) -> str:
    more = len(tensors.names) - 1
    return f"{tensors.names[0]} + {more} more" if more else tensors.names[0]


@lru_cache(4096)
def _quoted(text: str) -> str:
    return json.dumps(text)


def _us(ns: int) -> str:
    return f"{ns / 1000:.3f}"


def _meta(name: str, pid: int, args: dict[str, Any], tid: int = 0) -> str:
    return json.dumps({"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args})


def _span(name: str, where: tuple[int, int], start_ns: int, end_ns: int, more: str = "") -> str:
    pid, tid = where
    return (
        f'{{"ph":"X","name":{_quoted(name)},"pid":{pid},"tid":{tid},"ts":{_us(start_ns)},'
        f'"dur":{_us(max(0, end_ns - start_ns))}{more}}}'
    )
