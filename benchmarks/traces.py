"""How long it takes to make one trace of many ranks' rows, and to analyse it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.result import Result, Settings, Spread
from dtkit.trace.analysis import analyse
from dtkit.trace.chrome import write
from dtkit.trace.rows import (
    Collective,
    Head,
    Span,
    Step,
    Tensors,
    encode_names,
    encode_step,
    part_path,
    read_run,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["merging"]

_NUM_RANKS = 8
_EVENTS_PER_STEP = 10
"""Of a rank: the step, five phases, four collectives."""
_NUM_COLLECTIVES = 4


def merging(settings: Settings) -> list[Result]:
    """Measure reading and merging the rows of 8 ranks with 100,000 events each."""
    num_steps = settings.pick(100_000, 10_000) // _EVENTS_PER_STEP
    _write_rows(settings.folder, num_steps)
    merge_s, analysis_s = [], []
    for _ in range(settings.pick(5, 2)):
        begun_s = time.perf_counter()
        traces = read_run(settings.folder)
        num_events = write(traces, settings.folder / "trace.json.gz")
        merge_s.append(time.perf_counter() - begun_s)
        begun_s = time.perf_counter()
        analyse(traces)
        analysis_s.append(time.perf_counter() - begun_s)
    size_mib = (settings.folder / "trace.json.gz").stat().st_size / 2**20
    return [
        Result(
            name="merge",
            what=f"rows of {_NUM_RANKS} ranks with {num_steps * _EVENTS_PER_STEP:,} events each "
            "read and written as one compressed trace",
            spread=Spread.of(merge_s),
            unit="s",
            goal=30.0,
            num_steps=num_steps,
            command="read_run, write",
            held_back_by="JSON in Python",
            details={
                "events in the trace": f"{num_events:,}, {size_mib:.1f} MiB",
                "analysis": f"{Spread.of(analysis_s)} s",
            },
        )
    ]


def _write_rows(folder: Path, num_steps: int) -> None:
    ranks = tuple(range(_NUM_RANKS))
    tensors = {i: Tensors((f"allreduce.{i}",), "float32", (1000,)) for i in range(_NUM_COLLECTIVES)}
    for rank in ranks:
        head = Head(
            rank=rank, ranks=ranks, host="host", device="cpu", backend="gloo",
            start_unix_s=time.time(), start_ns=0,
        )  # fmt: skip
        path = part_path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(head.encode() + encode_names({0: ranks}, tensors))
            file.writelines(encode_step(_step(number, rank)) for number in range(1, num_steps + 1))


def _step(number: int, rank: int) -> Step:
    at_ns = 10_000_000 * number
    late_ns = 100_000 * rank
    spans = [Span(i, at_ns + 1_500_000 * i, at_ns + 1_500_000 * (i + 1)) for i in range(5)]
    parts = [
        Collective(
            0, 0, _NUM_COLLECTIVES * number + i, i, at_ns + 4_000_000 + 500_000 * i + late_ns,
            at_ns + 4_000_000 + 500_000 * i + late_ns, at_ns + 5_500_000 + 500_000 * i, 0, 0, 4000,
        )
        for i in range(_NUM_COLLECTIVES)
    ]  # fmt: skip
    return Step(number, at_ns, at_ns + 9_900_000, spans, parts)
