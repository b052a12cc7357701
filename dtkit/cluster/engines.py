"""Engines: calls, cells, control messages and signals, addressed by rank."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

from dtkit.cluster._remote import call_by_name
from dtkit.cluster.execution import Execution, call_failure
from dtkit.cluster.roster import Roster
from dtkit.errors import (
    ClosedError,
    ClusterDiedError,
    DtkitError,
    RankError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dtkit.cluster.placement import Slot

__all__ = ["Engines"]

# Any, below: ipyparallel's client, futures and messages carry no types.
Message = dict[str, Any]
OnMessage = "Callable[[int, Message], None]"

CALL_TIMEOUT_S = 60.0
CONTROL_TIMEOUT_S = 5.0
_POLL_S = 0.1
"""How often a wait looks whether whom it waits for is still there."""


class Engines(Roster):
    """All engines of one cluster, addressed by rank. Safe to use from any thread.

    Args:
        client: a connected `ipyparallel.Client`; closed by `close`.
        slots: which rank lives on which engine.
    """

    def __init__(self, client: Any, slots: Sequence[Slot]) -> None:
        super().__init__(client, slots)
        self._is_closed = False
        self._sent: dict[int, Any] = {}
        """The newest cell's futures, by rank."""

    @property
    def is_closed(self) -> bool:
        """Whether the connection was closed."""
        return self._is_closed

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
            self._address(rank)
            self._check_alive((rank,))
            view = self._client[self._engine_of[rank]]
            given = args[rank] if isinstance(args, dict) else args
            pending[rank] = view.apply_async(call_by_name, function, given)
        deadline = time.monotonic() + timeout_s
        results, failures = {}, []
        for rank, answer in pending.items():
            if not self._wait_answer(rank, answer, deadline):
                msg = f"rank {rank} did not answer {function} in {timeout_s:.0f} s; see %dist_where"
                raise DtkitError(msg)
            error = answer.exception()
            if error is None:
                results[rank] = answer.get()
            elif type(error).__name__ == "EngineError":  # ipyparallel's, for one that has ended
                self._note_left(rank)
                self._check_alive((rank,))
            else:
                failures.append(call_failure(rank, error))
        if failures:
            raise RankError(tuple(failures))
        return results

    def _wait_answer(self, rank: int, answer: Any, deadline: float) -> bool:
        """Wait for an answer, as long as its rank lives; return whether it came in time."""
        while not answer.wait(min(_POLL_S, max(0.0, deadline - time.monotonic()))):
            self._check_open()
            self._check_alive((rank,))
            if time.monotonic() >= deadline:
                return False
        return True

    def execute(
        self,
        code: str,
        ranks: Sequence[int],
        on_message: Callable[[int, Message], None],
        wake: Callable[[], None] = lambda: None,
    ) -> Execution:
        """Send a cell to ranks and return at once.

        Args:
            code: the cell; it runs as a notebook cell does, under IPython.
            ranks: where.
            on_message: called with (rank, iopub message) for everything the cell
                shows, in order per rank, on the client's own thread.
            wake: called there when a rank fails, replies or is flushed.
        """
        self._check_open()
        self._check_alive(ranks)
        client = self._client
        self._forget_cell()
        futures: dict[int, Any] = {}
        self._sent = futures
        execution = Execution(tuple(ranks), futures, self._lost)
        self._wake = wake

        def take(rank: int, message: Message) -> None:
            if message["header"]["msg_type"] == "dtkit_failed":
                execution.failing.add(rank)
                wake()
            else:
                on_message(rank, message)
            # It joins all text of a cell, anew with every message: hours of tqdm.
            kept = client.metadata[message["parent_header"]["msg_id"]]
            kept["stdout"] = kept["stderr"] = ""
            kept["outputs"].clear()

        for rank in ranks:

            def listen(future: Any, rank: int = rank) -> None:
                future.iopub_callbacks.append(lambda msg: take(rank, msg))
                future.add_done_callback(lambda _future: wake())

            ident = self._address(rank)
            self._check_alive((rank,))
            # Not view.execute: it lets one attach the listener only after the
            # message has left, and the first output can come before that.
            futures[rank] = client.send_execute_request(
                # The stream, not its socket: a send past it can swallow the one
                # notice that a reply has come, and the cell seems to run for ever.
                client._mux_stream,  # noqa: SLF001
                code,
                silent=False,
                metadata={"dtkit_ranks": list(ranks)},
                ident=ident,
                message_future_hook=listen,
            )
            # Only now: before it is sent there is no output to wait for.
            futures[rank].output.add_done_callback(lambda _future: wake())
        return execution

    def _forget_cell(self) -> None:
        """Let go of what the client keeps of the last cell: of ranks that died, all of it."""
        client = self._client
        client.history.clear()  # the number of every message, for calls by index
        for future in self._sent.values():
            for kept in (client._futures, client._output_futures, client.results, client.metadata):  # noqa: SLF001
                kept.pop(future.msg_id, None)

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
            ident = self._address(rank)
            if ident is None:
                continue
            pending[rank] = client._send(  # noqa: SLF001  no public way to the control channel
                client._control_stream,  # noqa: SLF001
                "dtkit_request",
                content={"json": body},
                ident=ident,
            )
        deadline = time.monotonic() + timeout_s
        answers = {}
        for rank, future in pending.items():
            if self._wait_reply(rank, future, deadline):
                answers[rank] = json.loads(future.result()["content"]["json"])
            else:  # the client would keep it for ever; a late answer is thrown away
                client._futures.pop(future.msg_id, None)  # noqa: SLF001
        return answers

    def signal(self, number: int, ranks: Iterable[int]) -> None:
        """Send a signal to engines' processes through their nannies."""
        self._check_open()
        living = [r for r in ranks if r not in self._lost and self._address(r) is not None]
        targets = [self._engine_of[rank] for rank in living]
        if targets:
            self._client.send_signal(number, targets, block=False)

    def close(self) -> None:
        """Disconnect; the engines go on. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            self._client.close()

    def _wait_reply(self, rank: int, future: Any, deadline: float) -> bool:
        """Wait for the answer to a control message, as long as its rank lives."""
        event = threading.Event()
        future.add_done_callback(lambda _f: event.set())
        while not event.wait(min(_POLL_S, max(0.0, deadline - time.monotonic()))):
            if rank in self._lost or time.monotonic() >= deadline:
                return False
        return True

    def _check_open(self) -> None:
        if self._broken:
            raise ClusterDiedError(self._broken)
        if self._is_closed:
            msg = "the session was shut down; start a new one with %dist_init"
            raise ClosedError(msg)
