"""Coordinator: it holds the negotiation, on rank 0, and answers every rank.

A thread hears the other ranks. What rank 0 itself submits is taken where it is submitted, and
what is agreed on is started there at once: two ways between threads less in every step.
"""

from __future__ import annotations

import contextlib
import hmac
import selectors
import socket
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from dtkit.horovod.negotiation import Negotiation
from dtkit.horovod.wire import Line, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dtkit.horovod.negotiation import Combine
    from dtkit.horovod.patience import Patience
    from dtkit.horovod.timeline import Timeline

__all__ = ["Coordinator", "OwnChannel"]


_LEAVE_S = 2.0
_BELL_BYTES = 4096
_INTERRUPTED = "rank {rank} was interrupted"


class Coordinator:
    """Serves the ranks until all of them are gone.

    Attributes:
        timeline: is told what the ranks submit; None: nobody is.

    Args:
        listener: where they connect.
        size: how many there are.
        token: what each must say first.
        patience: with ranks that do not come.
        combine: makes one payload of all ranks'.
    """

    def __init__(
        self, listener: socket.socket, size: int, token: str, patience: Patience,
        combine: Combine,
    ) -> None:  # fmt: skip
        self._listener = listener
        self._size = size
        self._token = token
        self._patience = patience
        self._negotiation = Negotiation(size, combine)
        self._lock = threading.RLock()
        """Held while something is taken and answered: so answers come in one order everywhere."""
        self._tell: dict[int, Callable[[Message], None]] = {}
        """By rank: sends over its line, or starts in this process what was agreed on."""
        self._lose_own: Callable[[], None] = lambda: None
        self._accepted: list[Line] = []
        self._behind: set[Line] = set()
        """Lines whose other end does not take what it is sent, such as of a stopped process."""
        self._num_gone = 0
        self.timeline: Timeline | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(
            target=self._serve, name="dtkit-hvd-coordinator", daemon=True
        )
        self._thread.start()

    def own_channel(self) -> OwnChannel:
        """Return how rank 0, which is in this process, reaches it."""
        return OwnChannel(self)

    def admit(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        """Let rank 0 take part; `take` gets what it is answered, `lose` is told of a failure."""
        self._lose_own = lose
        self._tell[0] = take

    def hear(self, message: Message) -> None:
        """Take a message of rank 0, and start what is agreed on by it."""
        try:
            with self._lock:
                self._take(0, message)
                self._heard()
        except BaseException:  # an interrupt: who was told of it, and who was not, is not known
            with self._lock:
                self._break(_INTERRUPTED.format(rank=0))
            raise
        if message["do"] == "leave":
            self._ring()

    def wait(self) -> None:
        """Wait until every rank has left, but not for long.

        Ranks that end together shall all see a proper end. One that never comes
        must not keep this process; it finds rank 0 gone.
        """
        self._thread.join(_LEAVE_S)

    def _serve(self) -> None:
        try:
            self._hear_all()
        except BaseException:
            self._give_up()
            raise
        finally:
            self._selector.close()
            for end in (self._listener, self._bell, self._ear):
                end.close()
            for line in self._accepted:
                line.close()

    def _give_up(self) -> None:
        """Let every rank know that nothing will be answered."""
        for line in tuple(self._accepted):
            line.hang_up()
        self._lose_own()

    def _ring(self) -> None:
        """Let the thread look up."""
        with contextlib.suppress(OSError):  # it has ended, or has much to hear
            self._bell.send(b"x")

    def _hear_all(self) -> None:
        while self._num_gone < self._size:
            for key, events in self._selector.select(self._patience.tick_s):
                if key.fileobj is self._ear:
                    self._ear.recv(_BELL_BYTES)
                    self._watch_those_behind()
                elif key.data is None:
                    self._accept()
                elif events & selectors.EVENT_WRITE:
                    self._catch_up(*key.data)
                else:
                    self._read(*key.data)
            with self._lock:
                self._heard()
                self._look_for_stalls()

    def _heard(self) -> None:
        timeline = self.timeline
        if timeline is not None:
            timeline.heard()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it hung up at once
            line = Line(self._listener.accept()[0], is_known=False)
            self._accepted.append(line)
            self._selector.register(line.connection, selectors.EVENT_READ, (line, None))

    def _read(self, line: Line, rank: int | None) -> None:
        messages = line.receive()
        if messages is None:
            self._drop(line)
            with self._lock:
                if rank is not None and rank in self._tell:
                    self._lose(rank, "is gone: its process ended")
                    self._break(f"rank {rank} is gone: its process ended")
            return
        for message in messages:
            if rank is None:
                rank = self._greet(line, message)
                if rank is None:
                    return
            else:
                with self._lock:
                    self._take(rank, message)

    def _greet(self, line: Line, message: Message) -> int | None:
        said = str(message.get("token"))
        if not hmac.compare_digest(said.encode(errors="replace"), self._token.encode()):
            self._drop(line)
            return None
        rank = int(message["rank"])
        line.is_known = True
        self._tell[rank] = partial(self._post, line)
        self._selector.modify(line.connection, selectors.EVENT_READ, (line, rank))
        return rank

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line.connection)
        self._accepted.remove(line)
        line.close()

    def _post(self, line: Line, message: Message) -> None:
        """Send without waiting: a rank that is stopped must not keep the others."""
        if not line.post(message):
            self._behind.add(line)
            self._ring()

    def _watch_those_behind(self) -> None:
        with self._lock:
            behind, self._behind = self._behind, set()
        for line in behind:
            with contextlib.suppress(KeyError, ValueError):  # it is gone
                key = self._selector.get_key(line.connection)
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self._selector.modify(line.connection, both, key.data)

    def _catch_up(self, line: Line, rank: int | None) -> None:
        with contextlib.suppress(OSError):  # its end is read
            if not line.post():
                return
        self._selector.modify(line.connection, selectors.EVENT_READ, (line, rank))

    def _take(self, rank: int, message: Message) -> None:
        if message["do"] == "submit":
            timeline = self.timeline
            if timeline is not None:
                timeline.submitted(rank, message["name"], message["meta"]["kind"])
            self._answer(self._negotiation.submit(rank, message, time.monotonic()))
        elif message["do"] == "wait":
            self._answer(self._negotiation.wait(rank, (message["set"], message["name"])))
        elif message["do"] == "break":
            self._break(_INTERRUPTED.format(rank=rank))
        elif message["do"] == "leave" and rank in self._tell:
            self._lose(rank, "has shut down")

    def _lose(self, rank: int, reason: str) -> None:
        del self._tell[rank]
        self._num_gone += 1
        self._answer(self._negotiation.lose(rank, reason))

    def _break(self, reason: str) -> None:
        """Let all ranks give up: they are no longer at the same place."""
        for tell in tuple(self._tell.values()):
            with contextlib.suppress(OSError):
                tell({"broken": reason})

    def _answer(self, answers: Iterable[tuple[int, Message]]) -> None:
        timeline, last = self.timeline, None
        # Rank 0 last: the others have been told by then, and start beside it.
        for rank, message in sorted(answers, key=lambda answer: answer[0] == 0):
            if timeline is not None and message is not last and "error" not in message:
                timeline.agreed(message["name"], message["meta"])
            last = message
            tell = self._tell.get(rank)
            if tell is not None:
                with contextlib.suppress(OSError):  # its end comes as a message of its own
                    tell(message)

    def _look_for_stalls(self) -> None:
        now_s = time.monotonic()
        if self._patience.warning_s > 0:
            for _, text in self._negotiation.stalled(now_s, self._patience.warning_s):
                sys.stderr.write(f"hvd: {text}\n")
                sys.stderr.flush()
        if self._patience.shutdown_s > 0:
            self._answer(self._negotiation.expired(now_s, self._patience.shutdown_s))


class OwnChannel:
    """Reaches the coordinator in the same process.

    Args:
        coordinator: it.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def open(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        """Begin to hear."""
        self._coordinator.admit(take, lose)

    def send(self, message: Message) -> None:
        """Tell the coordinator, which may answer before this returns."""
        self._coordinator.hear(message)

    def give_up(self) -> None:
        """Do nothing: `send` does not wait."""

    def close(self) -> None:
        """Do nothing: whoever closes has left."""
