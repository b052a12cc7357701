"""Execution: a cell that was sent to ranks, until each has answered or is gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dtkit.errors import RankFailure

__all__ = ["Execution", "Reply", "call_failure"]

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
    _lost: dict[int, str]
    replies: dict[int, Reply] = field(default_factory=dict)
    failing: set[int] = field(default_factory=set)
    """Ranks that have said that the cell failed there, ahead of their reply."""

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
            if future.done():
                self.replies[rank] = _reply(rank, future.result())
            elif rank in self._lost:  # ipyparallel takes a while to notice, if it does
                self.replies[rank] = Reply(rank, "died", "EngineDied", self._lost[rank])
        return len(self.replies) == len(self.ranks)

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
