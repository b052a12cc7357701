"""Rows and traces on disk: read back, merged, whole after a kill, bounded in size."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from traces import NS, Plan, make_traces, with_head

from dtkit.trace.chrome import RANK_PID, write
from dtkit.trace.profiles import merge
from dtkit.trace.rows import Clock, encode_names, encode_step, part_path, read_run

if TYPE_CHECKING:
    from pathlib import Path

    from dtkit.trace.rows import RankTrace


def assert_valid(trace: dict[str, Any]) -> None:
    """Hold every event against the format's rules.

    source: Trace Event Format (Google, 2016): the phases used here and what each needs.
    """
    open_events: dict[tuple[int, int], list[float]] = {}
    last_ts: dict[tuple[int, int], float] = {}
    for event in trace["traceEvents"]:
        phase, pid, tid = event["ph"], event["pid"], event.get("tid", 0)
        assert isinstance(pid, int)
        assert isinstance(tid, int)
        where = (pid, tid)
        if phase == "M":
            assert event["name"] in (
                "process_name", "process_sort_index", "thread_name", "thread_sort_index",
            )  # fmt: skip
            assert len(event["args"]) == 1
            continue
        assert event["ts"] >= 0
        if phase == "X":
            assert event["dur"] >= 0
            assert event["name"]
        elif phase == "B":
            assert event["name"]
            assert event["ts"] >= last_ts.get(where, 0)
            open_events.setdefault(where, []).append(event["ts"])
            last_ts[where] = event["ts"]
        elif phase == "E":
            assert event["ts"] >= open_events[where].pop()
            assert event["ts"] >= last_ts[where]
            last_ts[where] = event["ts"]
        else:
            assert (phase, event["name"], event["s"]) == ("i", "CYCLE_START", "g")
    assert not any(open_events.values())
    assert_nested([event for event in trace["traceEvents"] if event["ph"] == "X"])


def assert_nested(complete: list[dict[str, Any]]) -> None:
    """Hold that of two events on one line one is within the other, or after it."""
    lines: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in complete:  # in whole nanoseconds
        start, length = round(1000 * event["ts"]), round(1000 * event["dur"])
        lines.setdefault((event["pid"], event.get("tid", 0)), []).append((start, start + length))
    for spans in lines.values():
        ends: list[int] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)


def write_rows(folder: Path, traces: list[RankTrace]) -> None:
    """Write what the ranks would."""
    for trace in traces:
        path = part_path(folder, trace.head.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = b"".join(map(encode_step, trace.steps))
        path.write_bytes(trace.head.encode() + encode_names(trace.groups, trace.tensors) + rows)


def named(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event.get("name") == name]


def test_rows_are_read_back(tmp_path: Path) -> None:
    traces = make_traces([Plan(), Plan(data=5)])
    write_rows(tmp_path, traces)
    assert read_run(tmp_path) == traces
    last = read_run(tmp_path, 3)
    assert [[step.number for step in trace.steps] for trace in last] == [[8, 9, 10]] * 2
    assert read_run(tmp_path / "none") == []


def test_a_rank_that_was_killed_while_it_wrote_is_read_as_far_as_it_came(tmp_path: Path) -> None:
    write_rows(tmp_path, make_traces([Plan()] * 2))
    path = part_path(tmp_path, 1)
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        traces = read_run(tmp_path)
        assert len(traces[0].steps) == 10
        if len(traces) > 1:
            assert len(traces[1].steps) <= 10
        write(traces, tmp_path / "trace.json")
        assert_valid(json.loads((tmp_path / "trace.json").read_text()))


def test_clocks_are_put_on_the_first_ranks(tmp_path: Path) -> None:
    traces = make_traces([Plan()] * 2)
    write_rows(tmp_path, [traces[0], with_head(traces[1], offset_ns=5 * NS, error_ns=40_000)])
    shifted = read_run(tmp_path)
    assert shifted[1].steps[0].start_ns == 5 * NS
    assert shifted[1].steps[0].spans[0].end_ns == 6 * NS
    assert (
        shifted[1].steps[0].collectives[0].done_ns
        == 5 * NS + traces[1].steps[0].collectives[0].done_ns
    )
    write(shifted, tmp_path / "trace.json")
    about = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert about["error_us"] == 40
    assert about["clocks"]["1"] == {"host": "node1", "offset_us": 5000.0, "error_us": 40.0}


def test_a_clock_that_drifted_is_followed_evenly(tmp_path: Path) -> None:
    traces = make_traces([Plan()] * 2, 3)
    write_rows(tmp_path, traces)
    head, steps = traces[1].head, traces[1].steps
    clock = Clock(head.start_ns + 100 * NS, 10 * NS, 40_000)
    with part_path(tmp_path, 1).open("ab") as file:
        file.write(clock.encode())
    shifted = read_run(tmp_path)
    for step, before in zip(shifted[1].steps, steps, strict=True):
        assert step.start_ns == before.start_ns + (before.start_ns - head.start_ns) // 10
    assert shifted[0].steps == traces[0].steps
    write(shifted, tmp_path / "trace.json")
    about = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert about["clocks"]["1"]["drift_us"] == 10_000
    assert about["error_us"] == 40


def test_a_trace_has_horovods_rows_and_the_ranks(tmp_path: Path) -> None:
    write(make_traces([Plan(), Plan(forward=14)], 2), tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert_valid(trace)
    names = {
        e["args"]["name"]: e["pid"] for e in named(trace, "process_name") if "name" in e["args"]
    }
    assert names == {
        "allreduce.1.weight": 1,
        "allreduce.1.bias": 2,
        "allreduce.0.weight": 3,
        "rank 0 (node1, cuda:0)": RANK_PID,
        "rank 1 (node1, cuda:1)": RANK_PID + 1,
    }
    of_tensor = [e for e in trace["traceEvents"] if e["pid"] == 1 and e["ph"] != "M"][:12]
    assert [(e["ph"], e.get("name"), e["ts"]) for e in of_tensor] == [
        ("B", "NEGOTIATE_ALLREDUCE", 21_000.0),
        ("X", "0", 21_000.0),
        ("X", "1", 25_000.0),
        ("E", None, 25_000.0),
        ("B", "ALLREDUCE", 25_000.0),
        ("B", "MEMCPY_IN_FUSION_BUFFER", 25_000.0),
        ("E", None, 25_000.0),
        ("B", "GLOO_ALLREDUCE", 25_000.0),
        ("E", None, 26_000.0),
        ("B", "MEMCPY_OUT_FUSION_BUFFER", 38_000.0),
        ("E", None, 38_001.0),
        ("E", None, 38_001.0),
    ]
    assert of_tensor[-1]["args"] == {"dtype": "float32", "shape": "[110]"}
    for phase in ("data", "forward", "backward", "communication", "optimizer"):
        assert len(named(trace, phase)) == 4
    assert [e["ts"] for e in named(trace, "step 2")] == [40_000.0, 40_000.0]
    assert not named(trace, "CYCLE_START")


def test_cycles_are_marked_when_asked(tmp_path: Path) -> None:
    traces = [with_head(t, mark_cycles=True) for t in make_traces([Plan()], 3)]
    write(traces, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert_valid(trace)
    assert len(named(trace, "CYCLE_START")) == 3


def test_a_model_with_many_tensors_gets_a_row_per_collective(tmp_path: Path) -> None:
    traces = make_traces([Plan()] * 2, 2)
    many = tuple(f"allreduce.{i}" for i in range(500))
    for trace in traces:
        trace.tensors[0] = trace.tensors[0]._replace(names=many)
    write(traces, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {e["args"].get("name") for e in named(trace, "process_name")}
    assert "allreduce.0 + 499 more" in names
    assert len(names) == 5


def test_a_compressed_trace(tmp_path: Path) -> None:
    write(make_traces([Plan()] * 2, 2), tmp_path / "trace.json.gz")
    assert_valid(json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes())))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_validator_that_cannot_fail_proves_nothing() -> None:
    for broken in (
        {"ph": "B", "name": "a", "pid": 1, "ts": 1},
        {"ph": "X", "name": "a", "pid": 1, "ts": 1, "dur": -1},
        {"ph": "Z", "name": "a", "pid": 1, "ts": 1},
    ):
        with pytest.raises((AssertionError, KeyError)):
            assert_valid({"traceEvents": [broken]})
    spans = [{"ph": "X", "name": "a", "pid": 1, "ts": ts, "dur": 2} for ts in (1, 2)]
    with pytest.raises(AssertionError):
        assert_valid({"traceEvents": spans})


def test_collectives_that_overlap_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    traces = make_traces([Plan(), Plan(backward=60)])
    write(traces, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert_valid(trace)
    of_rank = [e for e in trace["traceEvents"] if e["pid"] == RANK_PID and e["ph"] == "X"]
    assert {e["tid"] for e in of_rank if e["name"].startswith("ALLREDUCE")} == {4, 5}


def make_profile(rank: int, shift_ns: int, calls: list[float]) -> tuple[Any, Any]:
    """Return what a rank's profiler exports: a step, and collectives at these microseconds."""
    step = {"ph": "X", "name": "ProfilerStep#7", "pid": 123, "tid": 5, "ts": 0.0, "dur": 100.0}
    collectives = [
        {"ph": "X", "name": "c10d::allreduce_", "pid": 123, "tid": 5, "ts": ts, "dur": 2.0}
        for ts in calls
    ]
    flow = {"ph": "s", "id": 1, "pid": 123, "tid": 5, "ts": 1.0, "cat": "fwdbwd", "name": "fwdbwd"}
    names = [
        {"ph": "M", "name": "process_name", "pid": 123, "tid": 0, "ts": 0,
         "args": {"name": "python"}},
        {"ph": "M", "name": "process_sort_index", "pid": "Spans", "tid": 0, "ts": 0,
         "args": {"sort_index": 3}},
    ]  # fmt: skip
    trace: dict[str, Any] = {
        "baseTimeNanoseconds": 10**18,
        "traceEvents": [*names, step, *collectives, flow],
    }
    # It is where the end of a step is seen.
    optimizer = {"ph": "X", "name": "Optimizer.step", "pid": 123, "tid": 5, "ts": 95.0, "dur": 9.0}
    trace["traceEvents"].append(optimizer)
    return {"rank": rank, "device": "cpu", "shift_ns": shift_ns}, trace


def test_profiles_are_merged_with_arrows_between_the_ranks() -> None:
    made = [make_profile(0, -(10**18), [10, 40]), make_profile(1, 5_000 - 10**18, [20, 60])]
    merged = merge([about for about, _ in made], [trace for _, trace in made])
    events = merged["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0 (cpu)", "rank 1 (cpu)"]
    assert len({e["pid"] for e in events}) == 4
    assert all(isinstance(e["pid"], int) for e in events)
    assert_nested([e for e in events if e["ph"] == "X"])
    steps = [e["ts"] for e in events if e["name"] == "ProfilerStep#7"]
    assert steps == [0, 5]
    assert len({e["id"] for e in events if e.get("cat") == "fwdbwd"}) == 2
    arrows = [(e["ph"], e["id"], e["ts"]) for e in events if e.get("cat") == "ranks"]
    assert arrows == [("s", 0, 10), ("f", 0, 25), ("s", 1, 40), ("f", 1, 65)]


def test_a_collective_that_a_rank_lacks_gets_no_arrow() -> None:
    made = [make_profile(0, 0, [10, 40]), make_profile(1, 0, [20])]
    merged = merge([about for about, _ in made], [trace for _, trace in made])
    assert sum(e.get("cat") == "ranks" for e in merged["traceEvents"]) == 2
