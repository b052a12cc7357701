"""The rows of the table: what is measured with each peer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.cells import NUM_RANKS
from benchmarks.peers.room import last_s
from benchmarks.peers.texts import ERROR, PASS, last_lines
from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from benchmarks.peers.peer import Open, Text
    from benchmarks.peers.room import Room

__all__ = ["ROWS", "TASKS", "Row", "Said", "Task"]

_TIMEOUT_S = 60.0
_HANG_S = 10.0
"""What is not shown or ended by then counts as never."""
_PATIENCE_S = 4.0
"""Between one press of ■ and the next."""
_NUM_PRESSES = 3
_LATE_S = 0.5
"""What is shown may come after the cell's end."""
_LOOK_S = 0.002


@dataclass(slots=True)
class Said:
    """What one round of a task found, by row: a number, a yes or no, or why there is neither."""

    numbers: dict[str, float] = field(default_factory=dict)
    facts: dict[str, bool] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table.

    Attributes:
        what: in words.
        unit: of its numbers; empty for a yes or no.
        scale: by which seconds are multiplied for the unit.
    """

    what: str
    unit: str = "s"
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is done in one go.

    Attributes:
        rows: that it fills.
        num_rounds: by default.
        measure: one round with one peer.
    """

    rows: tuple[str, ...]
    num_rounds: int
    measure: Callable[[Room], Said]


ROWS = {
    "start": Row("Start of two ranks, until their first collective has succeeded"),
    "rerun": Row("An edited training cell run again, until its first step", "ms", 1e3),
    "empty": Row("An empty cell, there and back", "ms", 1e3),
    "step": Row("A step of a small DDP model", "ms", 1e3),
    "lines": Row("10,000 lines printed by each rank, until the last is shown", "ms", 1e3),
    "lines_mb": Row("… and what is sent to the page for it", "MB", 1e-6),
    "pull": Row("1 GiB of parameters brought from a rank to the notebook"),
    "error": Row("A rank raises while the other waits for it: until the error is shown", "ms", 1e3),
    "error_end": Row("… until the cell has ended", "ms", 1e3),
    "error_kept": Row("… then names are kept and the next collective works", ""),
    "stop": Row("■ (Ctrl-C) during training, until the cell has ended", "ms", 1e3),
    "stop_kept": Row("… then names are kept and the next collective works", ""),
    "stuck": Row("■ while a rank waits in a collective for one that never comes", "ms", 1e3),
    "stuck_kept": Row("… then names are kept and the next collective works", ""),
}


def _start(room: Room) -> Said:
    opened, out = room.fresh(), room.out()
    begun_s = time.monotonic()
    opened.start()
    _run(opened, room.texts.collective(out))
    room.settle()
    return Said({"start": last_s(out) - begun_s})


def _rerun(room: Room) -> Said:
    opened = room.ready()
    if room.peer.keeps and not room.has_trained:  # what is run again has run before
        _run(opened, room.texts.first_step(room.out(), lr=0.01))
        room.has_trained = True
    out = room.out()
    begun_s = time.monotonic()
    _run(opened, room.texts.first_step(out, lr=0.011 + 1e-6 * len(str(out.parent))))
    return Said({"rerun": last_s(out) - begun_s})


def _empty(room: Room) -> Said:
    opened = room.ready()
    took_s = []
    for _ in range(9 if room.peer.keeps else 1):
        begun_s = time.monotonic()
        _run(opened, PASS)
        took_s.append(time.monotonic() - begun_s)
    return Said({"empty": median(took_s)})


def _lines(room: Room) -> Said:
    opened, out = room.ready(), room.out()
    opened.seen.watch(last_lines())
    opened.begin(room.texts.lines(out))
    at_s = opened.seen.wait(_TIMEOUT_S)
    num_bytes = opened.seen.num_bytes
    if not opened.wait(_TIMEOUT_S):
        _press(opened)
    opened.check()
    if at_s is None:
        return Said(missing={"lines": f"not in {_TIMEOUT_S:.0f} s"})
    return Said({"lines": at_s - last_s(out), "lines_mb": float(num_bytes)})


def _pull(room: Room) -> Said:
    out = room.out()
    took_s = room.ready().pull(room.texts.model(out, num_layers=16), out)
    return Said({"pull": took_s})


def _error(room: Room) -> Said:
    opened, out = room.ready(), room.out()
    opened.seen.watch([ERROR])
    opened.begin(room.texts.failing(out))
    raised_s = _wait_for(opened, [out.with_name("at1")])
    has_ended = opened.wait(_HANG_S)
    took_s = time.monotonic() - raised_s
    at_s = opened.seen.wait(_LATE_S)
    said = Said()
    if at_s is None:
        said.missing["error"] = "its text is not shown" if has_ended else f"not in {_HANG_S:.0f} s"
    else:
        said.numbers["error"] = at_s - raised_s
    if has_ended:
        said.numbers["error_end"] = took_s
    else:
        said.missing["error_end"] = f"hangs (not in {_HANG_S:.0f} s)"
        _press(opened)
    said.facts["error_kept"] = room.is_kept()
    return said


def _stop(room: Room) -> Said:
    return _stopped(room, "stop", room.texts.endless)


def _stuck(room: Room) -> Said:
    return _stopped(room, "stuck", room.texts.stuck)


def _stopped(room: Room, row: str, text: Callable[[Path], Text]) -> Said:
    opened, out = room.ready(), room.out()
    opened.begin(text(out))
    _wait_for(opened, [out.with_name(f"at{rank}") for rank in range(NUM_RANKS)])
    took_s = _press(opened)
    said = Said()
    if took_s is None:
        said.missing[row] = f"{_NUM_PRESSES} presses, not in {_PATIENCE_S * _NUM_PRESSES:.0f} s"
    else:
        said.numbers[row] = took_s
    said.facts[f"{row}_kept"] = room.is_kept()
    return said


def _run(opened: Open, text: Text) -> None:
    opened.begin(text)
    if not opened.wait(_TIMEOUT_S):
        msg = f"no end in {_TIMEOUT_S:.0f} s"
        raise BenchmarkError(msg)
    opened.check()


def _wait_for(opened: Open, paths: Iterable[Path]) -> float:
    """Wait until ranks have written their times; returns the last."""
    until_s = time.monotonic() + _TIMEOUT_S
    for path in paths:
        while not path.exists() or not path.read_text():
            opened.check()
            if time.monotonic() > until_s:
                msg = f"{path.name} was not written in {_TIMEOUT_S:.0f} s"
                raise BenchmarkError(msg)
            time.sleep(_LOOK_S)
    return max(float(path.read_text()) for path in paths)


def _press(opened: Open) -> float | None:
    """Interrupt, again if need be; returns the seconds from the first to the end."""
    begun_s = time.monotonic()
    for _ in range(_NUM_PRESSES):
        opened.interrupt()
        if opened.wait(_PATIENCE_S):
            return time.monotonic() - begun_s
    return None


TASKS = {
    "start": Task(("start",), 3, _start),
    "rerun": Task(("rerun",), 3, _rerun),
    "empty": Task(("empty",), 3, _empty),
    "lines": Task(("lines", "lines_mb"), 1, _lines),
    "pull": Task(("pull",), 1, _pull),
    "error": Task(("error", "error_end", "error_kept"), 1, _error),
    "stop": Task(("stop", "stop_kept"), 1, _stop),
    "stuck": Task(("stuck", "stuck_kept"), 1, _stuck),
}
"""By the name that `--only` takes. `step`, whose sides live at the same time, is beside them."""
