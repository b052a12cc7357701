"""Where this rank is now: its cell's line, and whether it computes, waits for data or for others.

It is read from the main thread's frames, from any other thread, so it costs the
training nothing and answers while the main thread is stuck in a collective.
"""

from __future__ import annotations

import json
import linecache
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from types import FrameType

    from dtkit.engine.process.agent import Agent

__all__ = ["Place", "install", "look"]

_WAITING_FOR_DATA = ("torch/utils/data/dataloader.py",)
_COMMUNICATING = (
    "torch/distributed/",
    "torch/nn/parallel/distributed.py",  # DDP agrees on its buckets in C++
    "dtkit/engine/reduce/",
)
_BACKWARD = "_engine_run_backward"
_NUM_LOOKS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is.

    Attributes:
        state: idle, python (computing, or anything else), data or collective.
        line: the cell's line, or the script's; None while idle.
        file: the script that `line` belongs to; empty: the cell.
        operation: the collective's name, such as all_reduce.
        sequence: its number among the collectives of its group, from 1; None for
            point-to-point operations of gloo, which are not numbered.
        group: the group's description or its ranks; empty for the whole group.
        seconds: how long it has been in the collective or has waited for data;
            else since the cell began.
    """

    state: str
    line: int | None = None
    file: str = ""
    operation: str = ""
    sequence: int | None = None
    group: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the place as JSON values."""
        return asdict(self)


def look(owner: Agent) -> Place:
    """Return where the main thread is now."""
    place = _look(owner)
    for _ in range(_NUM_LOOKS):
        if place.state != "collective" or (place.line, place.file) == _line(_frames()):
            break
        # It went on between the two readings, of its frames and of what is under way.
        place = _look(owner)
    return place


def _look(owner: Agent) -> Place:
    if not owner.is_busy:
        return Place("idle")
    frames = _frames()
    line, file = _line(frames)
    cell_s = owner.cell_seconds
    called = _called(frames)
    data_s = _data_seconds(frames)
    if data_s is not None and not called:  # what is divided is agreed on by all ranks
        return Place("data", line, file, seconds=data_s)
    flight = _in_flight() if called or _may_wait(frames) else None
    if flight is None:
        # gloo's send and recv are in no record: the frame alone tells of them.
        state = "collective" if called else "python"
        handle = _handle(frames)
        waiting_s = cell_s if handle is None else time.monotonic() - handle.submitted_s
        return Place(state, line, file, operation=called, seconds=waiting_s)
    return Place(
        "collective",
        line,
        file,
        operation=called or flight["profiling_name"].partition(":")[2],
        sequence=flight["p2p_seq_id"] if flight["is_p2p"] else flight["collective_seq_id"],
        group=_group_text(*flight["process_group"]),
        seconds=max(0.0, (time.time_ns() - flight["time_created_ns"]) / 1e9),
    )


def _group_text(name: str, description: str) -> str:
    """Return what a group is called, or its ranks: most are called by a hash of theirs."""
    if name in ("", "0") or description == "default_pg":
        return ""
    if description != "undefined":
        return f"group {description}"
    members = _members(name)
    return f"ranks {', '.join(map(str, members))}" if members else f"group {name}"


def _members(name: str) -> list[int]:
    """Return the ranks of the group that torch calls so; nothing if there is none."""
    for group, known in c10d._world.pg_names.copy().items():  # noqa: SLF001  no public way
        if known == name:
            return dist.get_process_group_ranks(group)
    return []


def install(owner: Agent) -> None:
    """Let the agent answer `where` and `collectives`."""
    owner.on("where", lambda _request: look(owner).to_dict())
    owner.on("collectives", lambda _request: collectives(owner))


def collectives(owner: Agent) -> dict[str, Any]:
    """Return what this rank waits for, and how far it has come in each group, as JSON values.

    waits: the collective that the main thread is in: its group, its number and operation there, and
        the ranks that belong to it; None: in none that is numbered.
    came: by group, number and operation of the newest that this rank has begun.
    """
    frames, entries = _frames(), [entry for entry in _recorded() if not entry["is_p2p"]]
    waits = None
    if owner.is_busy and (_called(frames) or _may_wait(frames)):
        waits = next((entry for entry in entries if _is_under_way(entry)), None)
    return {
        "waits": waits and {
            "group": _key(waits), "sequence": waits["collective_seq_id"],
            "operation": waits["profiling_name"], "ranks": _members(waits["process_group"][0]),
        },
        "came": {_key(e): [e["collective_seq_id"], e["profiling_name"]] for e in entries},
    }  # fmt: skip


def _frames() -> list[FrameType]:
    """Return the main thread's frames, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _line(frames: list[FrameType]) -> tuple[int | None, str]:
    """Return the innermost line of the cell that runs, or of the script that it runs."""
    cells = current_shell().compile._filename_map  # noqa: SLF001  no public way
    outermost = None
    for i in range(len(frames) - 1, -1, -1):
        name = frames[i].f_code.co_filename
        if outermost is None and name in cells:
            outermost = name
        elif outermost is not None and name.endswith("dtkit/engine/process/script.py") and i > 0:
            outermost = frames[i - 1].f_code.co_filename
            break
    if outermost is None:
        return None, ""
    for frame in frames:
        if frame.f_code.co_filename == outermost:
            return frame.f_lineno, "" if outermost in cells else PurePath(outermost).name
    return None, ""


def _data_seconds(frames: list[FrameType]) -> float | None:
    """Return how long the rank has waited for a batch; None if it does not."""
    if not any(f.f_code.co_filename.endswith(_WAITING_FOR_DATA) for f in frames):
        return None
    for frame in frames:
        if frame.f_code.co_qualname == "TimedBatches.__next__":
            return time.perf_counter() - float(frame.f_locals.get("start", time.perf_counter()))
    return 0.0


def _called(frames: list[FrameType]) -> str:
    """Return the function of torch.distributed that the rank is in, as the user knows it."""
    for frame in reversed(frames):
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if file.endswith("torch/distributed/distributed_c10d.py") and hasattr(dist, name):
            return name
        if file.endswith("dtkit/horovod/controller.py") and name == "submit":
            return f"hvd {frame.f_locals['name']}"  # rank 0 may not take what is sent
    handle = _handle(frames)
    return "" if handle is None else f"hvd {handle.name}"


def _handle(frames: list[FrameType]) -> Any:
    """Return the handle for which Horovod’s layer, which is above this one, waits; None: none.

    What is small there is no collective of torch's.
    """
    for frame in frames:
        if frame.f_code.co_qualname == "Handle.wait":
            return frame.f_locals["self"]
    return None


def _may_wait(frames: list[FrameType]) -> bool:
    """Whether the innermost frame is one from which C++ waits for collectives."""
    code = frames[0].f_code
    if code.co_name == _BACKWARD or any(part in code.co_filename for part in _COMMUNICATING):
        return True
    # Instructions that no line stands for (at the end of a `with`) have none.
    return "wait" in linecache.getline(code.co_filename, frames[0].f_lineno or 0)


def _in_flight() -> dict[str, Any] | None:
    """Return the oldest collective that has not ended."""
    return next(filter(_is_under_way, _recorded()), None)


def _recorded() -> list[dict[str, Any]]:
    """Return the last collectives of all groups from torch's flight recorder, oldest first."""
    # No public way, and no type stub of it.
    dump = import_module("torch._C._distributed_c10d")._dump_fr_trace_json  # noqa: SLF001
    found: list[dict[str, Any]] = json.loads(dump()).get("entries", [])
    return found


def _is_under_way(entry: dict[str, Any]) -> bool:
    return not entry["retired"] and entry["state"] != "completed"


def _key(entry: dict[str, Any]) -> str:
    """Return what a group of collectives that are numbered together is called on all ranks."""
    return f"{entry['process_group'][0]} {entry['profiling_name'].partition(':')[0]}"
