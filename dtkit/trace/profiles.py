"""The ranks' profiles as one trace: ranks as processes, arrows between parts of a collective."""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Operators", "merge", "profile_path", "read_operators", "write_profile"]

_PID_STEP = 1_000_000
_ID_STEP = 1_000_000_000
"""Flow numbers of different ranks must differ; torch counts from 1 on each."""
_STEP = "ProfilerStep#"
_STEPS_TID = 0
_COLLECTIVE = ("c10d::", "nccl:")

# Any, below: events as JSON.


class Operators:
    """Milliseconds per step that each operator takes itself, by rank."""

    def __init__(self, rows: dict[str, dict[int, float]], ranks: Sequence[int]) -> None:
        self.rows = rows
        self.ranks: tuple[int, ...] = tuple(ranks)


def profile_path(run_dir: Path, rank: int) -> Path:
    """Return where a rank writes its profile."""
    return run_dir / "profile" / f"rank-{rank}.json"


def read_operators(run_dir: Path) -> Operators | None:
    """Return the operators of all ranks, longest first; None if there is no profile."""
    abouts = _abouts(run_dir)
    rows: dict[str, dict[int, float]] = defaultdict(dict)
    for about in abouts:
        for name, _, host_ms, device_ms in about["operators"]:
            rows[name][about["rank"]] = (device_ms or host_ms) / about["num_steps"]
    ordered = sorted(rows.items(), key=lambda row: -sum(row[1].values()))
    return Operators(dict(ordered), [about["rank"] for about in abouts]) if abouts else None


def write_profile(run_dir: Path, path: Path) -> bool:
    """Merge what the ranks wrote into one compressed trace; return whether there was anything."""
    abouts = _abouts(run_dir)
    if not abouts:
        return False
    traces = [json.loads(profile_path(run_dir, a["rank"]).read_text()) for a in abouts]
    merged = merge(abouts, traces)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(gzip.compress(json.dumps(merged).encode(), 3))
    temporary.replace(path)
    return True


def merge(abouts: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one trace of all ranks', their times on the first rank's clock.

    Args:
        abouts: rank, device and shift_ns of each.
        traces: what torch's profiler exported on each.
    """
    zero_ns = min(_origin_ns(a, t) for a, t in zip(abouts, traces, strict=True))
    events: list[dict[str, Any]] = []
    by_rank: dict[int, list[dict[str, Any]]] = {}
    for about, trace in zip(abouts, traces, strict=True):
        shift_us = (about["shift_ns"] + trace.get("baseTimeNanoseconds", 0) - zero_ns) / 1000
        by_rank[about["rank"]] = list(_of_rank(about, trace["traceEvents"], shift_us))
        events += by_rank[about["rank"]]
    return {"displayTimeUnit": "ms", "traceEvents": [*events, *_arrows(by_rank)]}


def _origin_ns(about: dict[str, Any], trace: dict[str, Any]) -> int:
    first_us = min((e["ts"] for e in trace["traceEvents"] if e["ph"] == "X"), default=0)
    return int(about["shift_ns"] + trace.get("baseTimeNanoseconds", 0) + 1000 * first_us)


def _of_rank(
    about: dict[str, Any], events: Sequence[dict[str, Any]], shift_us: float
) -> Iterator[dict[str, Any]]:
    rank = about["rank"]
    pids: dict[Any, int] = {}
    for event in events:
        moved = dict(event)
        pid = pids.setdefault(event.get("pid"), _PID_STEP * (rank + 1) + len(pids))
        moved["pid"] = pid
        if event["ph"] == "M":
            moved.pop("ts", None)
            if event["name"] == "process_name":
                where = event["args"]["name"] if isinstance(event["pid"], str) else about["device"]
                moved["args"] = {"name": f"rank {rank} ({where})"}
            elif event["name"] == "process_sort_index":
                moved["args"] = {"sort_index": pid}
        else:
            moved["ts"] = event["ts"] + shift_us
            if str(event.get("name", "")).startswith(_STEP):
                # They end within the optimizer's step, which is where its end can be
                # seen; two that overlap cannot stand on one line.
                moved["tid"] = _STEPS_TID
        if isinstance(event.get("id"), int):
            moved["id"] = _ID_STEP * (rank + 1) + event["id"]
        yield moved
    for pid in {e["pid"] for e in events if str(e.get("name", "")).startswith(_STEP)}:
        about_line = {
            "name": "thread_name",
            "ph": "M",
            "tid": _STEPS_TID,
            "args": {"name": "steps"},
        }
        yield {**about_line, "pid": pids[pid]}


def _arrows(by_rank: dict[int, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield arrows from the first rank that called a collective through the others.

    The n-th call of a name within a step is the same collective on every rank.
    """
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for events in by_rank.values():
        for key, event in _collectives(events):
            found[key].append(event)
    for number, calls in enumerate(found.values()):
        if len(calls) < len(by_rank) or len(calls) == 1:
            continue
        ordered = sorted(calls, key=lambda e: float(e["ts"]))
        for i, call in enumerate(ordered):
            phase = "s" if i == 0 else "f" if i == len(ordered) - 1 else "t"
            arrow = {
                "ph": phase, "id": number, "cat": "ranks", "name": "same collective",
                "pid": call["pid"], "tid": call["tid"], "ts": call["ts"],
            }  # fmt: skip
            yield {**arrow, "bp": "e"} if phase == "f" else arrow


def _collectives(
    events: Sequence[dict[str, Any]],
) -> Iterator[tuple[tuple[str, str, int], dict[str, Any]]]:
    timed = sorted((e for e in events if e["ph"] == "X"), key=lambda e: float(e["ts"]))
    step, counts = "", defaultdict[str, int](int)
    for event in timed:
        name = str(event["name"])
        if name.startswith(_STEP):
            step = name
            counts.clear()
        elif name.startswith(_COLLECTIVE):
            counts[name] += 1
            yield (step, name, counts[name]), event


def _abouts(run_dir: Path) -> list[dict[str, Any]]:
    paths = (run_dir / "profile").glob("rank-*.about.json")
    abouts = [json.loads(path.read_text()) for path in paths]
    return sorted(
        (a for a in abouts if profile_path(run_dir, a["rank"]).exists()), key=lambda a: a["rank"]
    )
