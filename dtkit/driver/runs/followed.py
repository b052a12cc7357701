"""A run that goes on without its driver, followed by what its ranks write."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtkit.cluster import Reply
from dtkit.driver.runs.lines import GrowingLines
from dtkit.events import RankEnded, decode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dtkit.cluster import Engines
    from dtkit.driver.runs.run import Run

__all__ = ["FollowedExecution", "replay_output"]

_BRING_EVERY_S = 0.5

# Any, below: JSON.


def replay_output(run: Run) -> None:
    """Give a run back what its cell showed."""
    for rank in run.ranks:
        for line in GrowingLines(_output_path(run.dir, rank)).new():
            run.output.on_message(rank, _message(line))


class FollowedExecution:
    """A cell that another driver sent, as its ranks write it down. Like an `Execution`.

    Args:
        run: takes what is read.
        engines: tell which ranks are gone.
        bring_files: brings what ranks on other hosts have written to the run's folder; takes
            `is_over`.
    """

    def __init__(self, run: Run, engines: Engines, bring_files: Callable[..., None]) -> None:
        self._bring_files, self._next_s = bring_files, 0.0
        self._run = run
        self._engines = engines
        self.ranks: tuple[int, ...] = run.ranks
        self.replies: dict[int, Reply] = {}
        self.failing: set[int] = set()
        self._files = {rank: _RankFiles(run.dir, rank) for rank in run.ranks}

    def poll(self) -> bool:
        """Read what is new; return whether the cell has ended on all ranks."""
        if time.monotonic() >= self._next_s:
            self._bring_files(self._run.dir, is_over=False)
            self._next_s = time.monotonic() + _BRING_EVERY_S
        for rank, files in self._files.items():
            files.read(self._run.output.on_message)
            if rank not in self.replies:
                # Asked before the last look: a rank that is gone has nothing more to write.
                reply = files.reply()
                if reply is None and rank in self._engines.lost:
                    reply = Reply(rank, "died")
                if reply is not None:
                    self.replies[rank] = reply
        return len(self.replies) == len(self.ranks)

    def is_flushed(self) -> bool:
        """Whether everything the ranks showed was read: what ended is read to its end."""
        return True

    def has_failed(self, stopped: str) -> bool:
        """Whether the cell has failed on a rank, otherwise than by `stopped`."""
        return any(r.status != "ok" and r.ename != stopped for r in self.replies.values())

    @property
    def running(self) -> tuple[int, ...]:
        """Ranks whose cell goes on."""
        return tuple(rank for rank in self.ranks if rank not in self.replies)


@dataclass(slots=True)
class _RankFiles:
    """What one rank writes of a run: events, and what the cell shows."""

    folder: Path
    rank: int
    _events: GrowingLines = field(init=False)
    _output: GrowingLines = field(init=False)
    _error: dict[str, Any] = field(default_factory=dict)
    _state: str = ""

    def __post_init__(self) -> None:
        self._events = GrowingLines(self.folder / f"rank-{self.rank}.jsonl")
        self._output = GrowingLines(_output_path(self.folder, self.rank))

    def read(self, on_message: Callable[[int, dict[str, Any]], None]) -> None:
        events = self._events.new()  # before the output, which is complete when they say the end
        for line in self._output.new():
            message = _message(line)
            if message["header"]["msg_type"] == "error":
                self._error = message["content"]
            on_message(self.rank, message)
        if events:
            header = {"msg_type": "dtkit_events"}
            buffers = [b"\n".join(events)]
            on_message(self.rank, {"header": header, "content": {}, "buffers": buffers})
        for event in map(decode, events[-1:]):  # a rank's end is the last that is heard of it
            if isinstance(event, RankEnded):
                self._state = event.state

    def reply(self) -> Reply | None:
        """Return how the cell ended here, None while it goes on."""
        if not self._state:
            return None
        if self._state == "finished":
            return Reply(self.rank, "ok")
        if self._state == "stopped":
            return Reply(self.rank, "error", "RunStopped")
        return Reply(
            self.rank,
            "error",
            self._error.get("ename", "Error"),
            self._error.get("evalue", "the traceback was not stored"),
            "\n".join(self._error.get("traceback", [])),
        )


def _output_path(folder: Path, rank: int) -> Path:
    return folder / f"output-{rank}.jsonl"


def _message(line: bytes) -> dict[str, Any]:
    """Return a stored message in the form in which it once came from the rank."""
    record = json.loads(line)
    return {"header": {"msg_type": record["msg_type"]}, "content": record["content"]}
