"""Engines: calls, cells, control messages and signals, addressed by rank."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtkit.cluster._remote import call_by_name
from dtkit.errors import ClosedError, DtkitError, EngineDiedError, RankError, RankFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dtkit.cluster.placement import Slot

__all__ = ["Engines", "Execution", "Reply"]

# Any, below: ipyparallel's client, futures and messages carry no types.
Message = dict[str, Any]
OnMessage = "Callable[[int, Message], None]"

CALL_TIMEOUT_S = 60.0
CONTROL_TIMEOUT_S = 5.0


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
    replies: dict[int, Reply] = field(default_factory=dict)

    def poll(self) -> bool:
        """Collect finished ranks; return whether all have finished."""
        for rank, future in self._futures.items():
            if rank not in self.replies and future.done():
                self.replies[rank] = _reply(rank, future.result())
        return len(self.replies) == len(self.ranks)

    def is_flushed(self) -> bool:
        """Whether everything the ranks printed has arrived."""
        return all(
            future.output.done() or self.replies[rank].status == "died"
            for rank, future in self._futures.items()
        )

    def on_change(self, wake: Callable[[], None]) -> None:
        """Let `wake` be called, on the client's thread, when a rank replies or is flushed."""
        for future in self._futures.values():
            future.add_done_callback(lambda _future: wake())
            future.output.add_done_callback(lambda _future: wake())

    @property
    def running(self) -> tuple[int, ...]:
        """Ranks that have not replied yet."""
        return tuple(rank for rank in self.ranks if rank not in self.replies)


class Engines:
    """All engines of one cluster, addressed by rank. Safe to use from any thread.

    Args:
        client: a connected `ipyparallel.Client`; closed by `close`.
        slots: which rank lives on which engine.
    """

    def __init__(self, client: Any, slots: Sequence[Slot]) -> None:
        self._client = client
        self._engine_of = {slot.rank: slot.engine for slot in slots}
        self._rank_of = {slot.engine: slot.rank for slot in slots}
        self._lost: set[int] = set()
        self._is_closed = False
        client._registration_callbacks.append(self._on_registration)  # noqa: SLF001  no public way

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank, alive or not."""
        return tuple(sorted(self._engine_of))

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks whose engine has gone."""
        return tuple(sorted(self._lost))

    @property
    def is_closed(self) -> bool:
        """Whether the connection was closed."""
        return self._is_closed

    def are_registered(self) -> bool:
        """Whether every engine has reported to the controller."""
        return set(self._engine_of.values()) <= set(self._client.ids)

    def note_missing(self) -> None:
        """Count engines that are not registered now as lost: for a cluster that was running."""
        there = set(self._client.ids)
        self._lost.update(rank for rank, engine in self._engine_of.items() if engine not in there)

    def call(
        self,
        function: str,
        args: Mapping[int, tuple[Any, ...]] | tuple[Any, ...] = (),
        *,
        ranks: Iterable[int] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[int, Any]:
        """Call `module:function` on ranks, wait, and return the results by rank.

        Args:
            function: the function's name; the driver never imports its module.
            args: positional arguments, the same for all or by rank.
            ranks: whom to call; all by default.
            timeout_s: for all the answers together.

        Raises:
            RankError: the function raised on a rank.
            EngineDiedError: a rank is gone.
            DtkitError: no answer in time; the rank may be running a cell.
        """
        self._check_open()
        ranks = self.ranks if ranks is None else tuple(ranks)
        self._check_alive(ranks)
        pending = {}
        for rank in ranks:
            view = self._client[self._engine_of[rank]]
            given = args[rank] if isinstance(args, dict) else args
            pending[rank] = view.apply_async(call_by_name, function, given)
        deadline = time.monotonic() + timeout_s
        results, failures = {}, []
        for rank, answer in pending.items():
            if not answer.wait(max(0.0, deadline - time.monotonic())):
                msg = f"rank {rank} did not answer {function} in {timeout_s:.0f} s; see %dist_where"
                raise DtkitError(msg)
            error = answer.exception()
            if error is None:
                results[rank] = answer.get()
            else:
                failures.append(_failure(rank, error))
        if failures:
            raise RankError(tuple(failures))
        return results

    def execute(
        self, code: str, ranks: Sequence[int], on_message: Callable[[int, Message], None]
    ) -> Execution:
        """Send a cell to ranks and return at once.

        Args:
            code: the cell; it runs as a notebook cell does, under IPython.
            ranks: where.
            on_message: called with (rank, iopub message) for everything the cell
                shows, in order per rank, on the client's own thread.
        """
        self._check_open()
        self._check_alive(ranks)
        client, futures = self._client, {}
        for rank in ranks:

            def listen(future: Any, rank: int = rank) -> None:
                future.iopub_callbacks.append(lambda msg: on_message(rank, msg))

            _, (ident,) = client._build_targets(self._engine_of[rank])[::-1]  # noqa: SLF001
            # Not view.execute: it lets one attach the listener only after the
            # message has left, and the first output can come before that.
            futures[rank] = client.send_execute_request(
                # The stream, not its socket: a send past it can swallow the one
                # notice that a reply has come, and the cell seems to run for ever.
                client._mux_stream,  # noqa: SLF001
                code,
                silent=False,
                ident=ident,
                message_future_hook=listen,
            )
        return Execution(tuple(ranks), futures)

    def control(
        self,
        operation: str,
        content: Mapping[str, Any] | None = None,
        *,
        ranks: Iterable[int] | None = None,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> dict[int, dict[str, Any]]:
        """Ask ranks something while they may be busy; return the answers that came in time.

        The answer comes from a thread of the engine that no cell can block, save
        by holding the GIL. JSON both ways.
        """
        self._check_open()
        client = self._client
        ranks = [r for r in (self.ranks if ranks is None else ranks) if r not in self._lost]
        body = json.dumps({"operation": operation, **(content or {})})
        pending = {}
        for rank in ranks:
            ident = client._build_targets(self._engine_of[rank])[0][0]  # noqa: SLF001
            pending[rank] = client._send(  # noqa: SLF001  no public way to the control channel
                client._control_stream,  # noqa: SLF001
                "dtkit_request",
                content={"json": body},
                ident=ident,
            )
        deadline = time.monotonic() + timeout_s
        answers = {}
        for rank, future in pending.items():
            if _wait(future, deadline):
                answers[rank] = json.loads(future.result()["content"]["json"])
        return answers

    def signal(self, number: int, ranks: Iterable[int]) -> None:
        """Send a signal to engines' processes through their nannies."""
        self._check_open()
        targets = [self._engine_of[r] for r in ranks if r not in self._lost]
        if targets:
            self._client.send_signal(number, targets, block=False)

    def close(self) -> None:
        """Disconnect; the engines go on. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            self._client.close()

    def _on_registration(self, event: Message) -> None:
        if event["event"] == "unregister":
            rank = self._rank_of.get(int(event["id"]))
            if rank is not None:
                self._lost.add(rank)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the session was shut down; start a new one with %dist_init"
            raise ClosedError(msg)

    def _check_alive(self, ranks: Iterable[int]) -> None:
        gone = sorted(self._lost.intersection(ranks))
        if gone:
            msg = (
                f"rank {', '.join(map(str, gone))} is gone: its engine ended. "
                "Start again with %dist_shutdown and %dist_init"
            )
            raise EngineDiedError(msg)


def _wait(future: Any, deadline: float) -> bool:
    event = threading.Event()
    future.add_done_callback(lambda _f: event.set())
    return event.wait(max(0.0, deadline - time.monotonic()))


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


def _failure(rank: int, error: BaseException) -> RankFailure:
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
