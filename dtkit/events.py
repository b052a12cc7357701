"""What a rank tells the driver during a run: the wire format, shared by both sides.

One event is one JSON line, both on the wire and in the run's folder
(`<run>/rank-<R>.jsonl`), so a run can be read back from disk with nothing but
this module. Steps travel in columns, many per event, because a small model
makes thousands of them a second; a column whose entries are all the same is
one entry, and on the wire a column is its float64 in base64, which is read in a
quarter of the time. JSON has no infinities, so non-finite numbers are written as the
strings "NaN", "Infinity" and "-Infinity" (the mapping that protobuf's JSON
uses); `float()` reads them back.

Standard library only: this module is imported by the driver, which must not
load torch, and by the engines.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any, get_args

__all__ = [
    "OVER",
    "STEP_COLUMNS",
    "ControlDeclared",
    "ControlsChanged",
    "Event",
    "GpuUse",
    "LogBatch",
    "Note",
    "RankEnded",
    "RankStarted",
    "StepBatch",
    "Total",
    "decode",
    "encode",
    "flush_interval_s",
    "until_flush_s",
]

STEP_COLUMNS = (
    "step", "time_s", "loss", "samples", "step_ms", "data_ms", "comm_ms", "lr",
    "sent_bytes", "raw_bytes",
)  # fmt: skip
"""Columns of `StepBatch`, one entry per optimizer step.

step: index of the step in this run, from 1.
time_s: seconds from the run's start to the end of the step.
loss: sum of the losses that were backpropagated into the step, on this rank (NaN: none seen).
samples: samples this rank contributed to the step (0: unknown).
step_ms: wall time of the step. data_ms: of it, waiting for a DataLoader.
comm_ms: of it, waiting for gradients of other ranks (exposed communication).
lr: learning rate of the first parameter group.
sent_bytes: what this rank sent to average gradients. raw_bytes: what it would have sent without
compression. Both are NaN where the cell averages by itself.
"""


MAX_MESSAGES_PER_S = 80
"""That all ranks of a run send together, as long as each does so once in two seconds."""


@dataclass(frozen=True, slots=True)
class RankStarted:
    """The rank entered the run."""

    rank: int
    pid: int
    host: str
    device: str
    start_unix_s: float


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Finished steps of one rank since its last batch; see `STEP_COLUMNS`."""

    rank: int
    columns: dict[str, list[float]]
    peak_bytes: int = 0
    """High-water mark of device memory (CUDA) or resident memory (CPU) in this run."""
    num_dropped: int = 0
    """Steps that fell out of the ring since the last batch because it was full."""


@dataclass(frozen=True, slots=True)
class LogBatch:
    """Values given to `dtkit.log`: parallel lists of step, seconds and metrics."""

    rank: int
    step: list[int]
    time_s: list[float]
    metrics: list[dict[str, float | list[float]]]
    """A pair is a ratio's numerator and denominator: the ranks' are added up, and then divided."""


@dataclass(frozen=True, slots=True)
class Total:
    """How many steps the run's loops amount to, read from their source; an estimate."""

    rank: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Note:
    """One line for the user about what dtkit did, or left alone and why."""

    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class GpuUse:
    """The rank's GPU, as NVML says that all processes use it; about one a second."""

    rank: int
    step: int
    time_s: float
    busy_percent: float
    """NaN where it is not known."""
    used_bytes: float
    total_bytes: float


@dataclass(frozen=True, slots=True)
class ControlDeclared:
    """The cell asked for a live control for the first time; see `dtkit.livecontrol`."""

    rank: int
    name: str
    default: bool | float | str
    low: float | None
    high: float | None
    choices: list[bool | float | str]


@dataclass(frozen=True, slots=True)
class ControlsChanged:
    """Live controls got new values after a step; the next one is made with them.

    change: the same number on all ranks.
    """

    rank: int
    change: int
    step: int
    time_s: float
    values: dict[str, bool | float | str]


OVER = ("finished", "stopped", "failed")
"""How a run, or a rank's part in it, ends: states that will not change any more."""


@dataclass(frozen=True, slots=True)
class RankEnded:
    """The rank left the run. state: one of `OVER`.

    summary: `optimizer`, the leading one's class, and `sent_bytes`, what the rank sent after its
    last step to make all ranks equal, if it did.
    """

    rank: int
    state: str
    num_steps: int
    time_s: float
    summary: dict[str, Any] = field(default_factory=dict)


Event = (
    RankStarted | StepBatch | LogBatch | GpuUse | Total | Note | ControlDeclared
    | ControlsChanged | RankEnded
)  # fmt: skip
_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Event)}


def flush_interval_s(num_ranks: int) -> float:
    """Return how often each of so many ranks sends what it has measured, in seconds.

    Ten times a second; of more than 8 ranks less often, so that the driver reads no more than 80
    messages a second: each costs it, however much is in it.
    """
    return min(max(0.1, num_ranks / MAX_MESSAGES_PER_S), 2.0)


def until_flush_s(interval_s: float, unix_s: float) -> float:
    """Return how long a rank waits until it sends again: at most one and a half intervals.

    All ranks send at the same moments, at multiples of the interval of the time of day. What
    comes in one burst costs the driver a third of what it does one by one, as each wakes it up; and
    ranks that wait for each other are held up once, and not each in its turn.
    """
    rest_s = interval_s - unix_s % interval_s
    return rest_s if rest_s > interval_s / 2 else rest_s + interval_s


def encode(event: Event, *, is_compact: bool = False) -> bytes:
    """Return the event as one JSON line without its line end.

    Args:
        event: the event.
        is_compact: write columns as base64: for the wire, where nobody else reads them.
    """
    # Not asdict, which copies every number: what encodes shares the interpreter with training.
    record = {name: getattr(event, name) for name in event.__slots__}
    if isinstance(event, StepBatch):
        columns = {name: _shortened(column) for name, column in event.columns.items()}
        packed = {name: _packed(column) for name, column in columns.items() if is_compact}
        record["columns"] = packed or columns
    record = {name: _finite(value) for name, value in record.items()}
    record = {"event": type(event).__name__, **record}
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode()


def decode(line: bytes | str) -> Event:
    """Return the event that `encode` wrote.

    Raises:
        ValueError: the line is not an event of this version.
    """
    record = json.loads(line)
    cls = _TYPES.get(record.pop("event", None))
    if cls is None:
        msg = f"not a dtkit event: {line[:80]!r}"
        raise ValueError(msg)
    if cls is StepBatch:
        columns = {name: _numbers(column) for name, column in record["columns"].items()}
        num = len(columns.get("step", ()))
        record["columns"] = {
            name: column * num if len(column) == 1 else column for name, column in columns.items()
        }
    elif cls is LogBatch:
        record["metrics"] = [{k: _number(v) for k, v in m.items()} for m in record["metrics"]]
    elif cls is GpuUse:
        record["busy_percent"] = float(record["busy_percent"])
    try:
        return cls(**record)  # type: ignore[no-any-return]
    except TypeError as error:
        msg = f"not a dtkit event of this version: {line[:80]!r}"
        raise ValueError(msg) from error


def _shortened(column: list[float]) -> list[float]:
    """Return a column of which all entries are the same as one entry: half of them are."""
    is_same = len(column) > 1 and column.count(column[0]) == len(column)
    return column[:1] if is_same else column


def _packed(column: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(column)}d", *column)).decode()


def _numbers(column: str | list[Any]) -> list[float]:  # Any: a number, or the name of one
    if isinstance(column, str):
        packed = base64.b64decode(column)
        return list(struct.unpack(f"<{len(packed) // 8}d", packed))
    return list(map(float, column))


def _number(value: Any) -> float | list[float]:  # Any: JSON
    return list(map(float, value)) if isinstance(value, list) else float(value)


def _finite(value: Any) -> Any:  # Any: JSON is a recursive union
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        # A step's ten columns are looked at in C, those that are NaN throughout included.
        if set(map(type, value)) <= {int, float}:
            if math.isfinite(sum(value)):
                return value
            if value.count(math.nan) == len(value):
                return ["NaN"] * len(value)
        return [_finite(v) for v in value]
    return value
