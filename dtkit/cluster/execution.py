"""Execution: a cell that was sent to ranks, until each has answered or is gone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dtkit.cluster.roster import HAS_LEFT
from dtkit.errors import RankFailure

__all__ = ["Execution", "Reply", "call_failure"]

_ROSTER_S = 3.0
"""How long the roster may take to hear what ipyparallel tells of an engine: a host is asked."""

# Any, below: ipyparallel's futures and results carry no types.


@dataclass(frozen=True, slots=True)
class Reply:
    """How the cell ended on one rank. status: ok, error, aborted or died."""

    rank: int
    status: str
    ename: str = ""
    evalue: str = ""
    traceback: str = ""


@dataclass(slots=True)
class Execution:
    """A cell that was sent to ranks; `replies` grows as they finish."""

    ranks: tuple[int, ...]
    _futures: dict[int, Any]
    _lost: dict[int, str]  # the roster's own
    replies: dict[int, Reply] = field(default_factory=dict)
    failing: set[int] = field(default_factory=set)
    """Ranks that have said that the cell failed there, ahead of their reply."""
    _told_s: dict[int, float] = field(default_factory=dict)

    def has_failed(self, stopped: str) -> bool:
        """Whether the cell has failed on a rank, otherwise than by `stopped`."""
        return bool(self.failing) or any(
            r.status != "ok" and r.ename != stopped for r in self.replies.values()
        )

    def poll(self) -> bool:
        """Collect finished ranks; return whether all have finished."""
        for rank, future in self._futures.items():
            if rank in self.replies:
                continue
            reply = _reply(rank, future.result()) if future.done() else None
            if reply is not None and reply.status != "died":
                self.replies[rank] = reply
            elif self._has_died(rank, is_told=reply is not None):
                self.replies[rank] = Reply(rank, "died", "EngineDied", self._lost[rank])
        return len(self.replies) == len(self.ranks)

    def _has_died(self, rank: int, *, is_told: bool) -> bool:
        """Whether a rank is counted as lost, by all who ask.

        ipyparallel takes a while to tell that an engine has ended, if it does; and when it does,
        it is a moment before the roster hears of it, and how. A cell that had ended by then would
        be followed by a repair of a group with no rank lost.
        """
        if rank not in self._lost and is_told:
            now_s = time.monotonic()
            if now_s - self._told_s.setdefault(rank, now_s) > _ROSTER_S:
                self._lost.setdefault(rank, HAS_LEFT)
        return rank in self._lost

    def is_flushed(self) -> bool:
        """Whether everything the ranks printed has arrived."""
        return all(
            future.output.done() or self.replies[rank].status == "died"
            for rank, future in self._futures.items()
        )

    @property
    def running(self) -> tuple[int, ...]:
        """Ranks that have not replied yet."""
        return tuple(rank for rank in self.ranks if rank not in self.replies)


def _reply(rank: int, result: Any) -> Reply:
    # ExecuteReply on success, RemoteError (an exception that was not raised) otherwise.
    if not isinstance(result, BaseException):
        return Reply(rank, "ok")
    name = getattr(result, "ename", type(result).__name__)
    if name == "EngineError":
        return Reply(rank, "died", name, str(getattr(result, "evalue", result)))
    status = "aborted" if type(result).__name__ == "TaskAborted" else "error"
    return Reply(
        rank,
        status,
        name,
        str(getattr(result, "evalue", result)),
        str(getattr(result, "traceback", "")),
    )


def call_failure(rank: int, error: BaseException) -> RankFailure:
    """Return how a call of a function failed on a rank."""
    inner = getattr(error, "elist", None)
    if inner:  # CompositeError of one engine
        _, ename, evalue, *_ = inner[0]
        return RankFailure(rank, ename, str(evalue), str(error))
    return RankFailure(
        rank,
        getattr(error, "ename", type(error).__name__),
        str(getattr(error, "evalue", error)),
        str(getattr(error, "traceback", "") or error),
    )
