"""Between a rank and the coordinator: JSON messages over a socket, one a line.

A message may have a *payload*, bytes that follow its line. No pickle on an open port.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_PAYLOAD_BYTES", "Channel", "Line", "Message", "RemoteChannel"]

Message = dict[str, Any]  # Any: JSON, and a payload's memoryview
Data = bytes | memoryview

_CHUNK_BYTES = 1 << 16
_MAX_PARTS = 64
"""Of a message and what waits before it, at once: the system takes no more than 1024."""
_LOOK_MS = 200
MAX_PAYLOAD_BYTES = 4 << 20
"""No rank sends more."""


class Line:
    """One end of a connection that carries messages.

    Attributes:
        is_known: whether the other end may send long messages.

    Args:
        connection: connected; closed with this object.
    """

    def __init__(self, connection: socket.socket, *, is_known: bool = True) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.is_known = is_known
        self._lock = threading.Lock()
        self._unsent: list[Data] = []
        self._is_given_up = False
        self._rest = b""
        self._open: Message | None = None
        """Its payload is not whole."""
        self._missing = memoryview(b"")
        """The part of it that is still to come."""

    def send(self, message: Message) -> None:
        """Send a message, from any thread, and wait until it has left.

        Raises:
            OSError: the other end is gone, or was given up.
        """
        with self._lock:
            try:
                parts = self._push(_encoded(message))
                while parts:
                    self._wait()
                    parts = self._push(parts)
            except BaseException:  # a signal's, too, and a message may have left in part
                self.hang_up()
                raise

    def post(self, message: Message | None = None) -> bool:
        """Send a message as far as that is possible without waiting, after what is left.

        Returns:
            Whether all has left. If not, call it again when the connection can be written to.

        Raises:
            OSError: the other end is gone.
        """
        with self._lock:
            try:
                self._unsent = self._push(self._unsent)
                parts = [] if message is None else _encoded(message)
                left = parts if self._unsent else self._push(parts)
                self._unsent += map(bytes, left)  # copied: payloads are used again
            except BaseException:
                self.hang_up()
                raise
            return not self._unsent

    def give_up(self) -> None:
        """End the `send` that waits now, or will have to."""
        self._is_given_up = True

    def receive(self) -> list[Message] | None:
        """Return the messages that are there, waiting for something; None at the end.

        None of them may be whole yet. What is no message is the end too: whoever finds the
        port may send anything.
        """
        try:
            if self._open is None:
                data = self.connection.recv(_CHUNK_BYTES)
                return self._parse(self._rest + data) if data else None
            num_bytes = self.connection.recv_into(self._missing)
            if not num_bytes:
                return None
            self._missing = self._missing[num_bytes:]
            return self._parse(b"")
        except (OSError, ValueError, RecursionError):  # of lists in lists in lists
            return None

    def hang_up(self) -> None:
        """End the connection; who waits in `receive`, on either end, gets None.

        It stays open, for the selector that watches it.
        """
        with contextlib.suppress(OSError):  # the other end was quicker
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and close it."""
        self.hang_up()
        with self._lock:  # whoever sends is through: another connection may get the number
            self.connection.close()

    def _parse(self, data: bytes) -> list[Message]:
        """Return the messages that are whole now, and keep the rest.

        Raises:
            ValueError: it is no message.
        """
        messages = []
        while True:
            if self._open is not None:
                num_bytes = min(len(data), len(self._missing))
                self._missing[:num_bytes] = data[:num_bytes]
                self._missing, data = self._missing[num_bytes:], data[num_bytes:]
                if self._missing:
                    break
                messages.append(self._open)
                self._open = None
            line, newline, rest = data.partition(b"\n")
            if len(line) > _CHUNK_BYTES and not self.is_known:
                msg = "no greeting"
                raise ValueError(msg)
            if not newline:
                break
            data = rest
            self._begin(json.loads(line))
        self._rest = data
        return messages

    def _begin(self, message: Any) -> None:  # Any: whatever came
        if not isinstance(message, dict):
            msg = "no message"
            raise ValueError(msg)  # noqa: TRY004  as for all that is no message
        num_bytes = message.get("payload", 0)
        if type(num_bytes) is not int or not 0 <= num_bytes <= MAX_PAYLOAD_BYTES:
            msg = "no payload of a rank"
            raise ValueError(msg)
        self._open = message
        self._missing = memoryview(bytearray(num_bytes))
        if "payload" in message:
            message["payload"] = self._missing

    def _push(self, parts: list[Data]) -> list[Data]:
        """Send what the connection takes; returns what is left."""
        with contextlib.suppress(BlockingIOError):
            while parts:
                num_bytes = self.connection.sendmsg(parts[:_MAX_PARTS], [], socket.MSG_DONTWAIT)
                parts = _without(parts, num_bytes)
        return parts

    def _wait(self) -> None:
        """Wait until the connection takes more."""
        poll = select.poll()
        poll.register(self.connection, select.POLLOUT)
        while not poll.poll(_LOOK_MS):
            if self._is_given_up:
                msg = "given up"
                raise BrokenPipeError(msg)


def _encoded(message: Message) -> list[Data]:
    payload = message.get("payload")
    if payload is None:
        return [_json(message)]
    return [_json({**message, "payload": len(payload)}), payload]


def _json(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _without(parts: list[Data], num_bytes: int) -> list[Data]:
    """Return the parts without so many bytes at their beginning."""
    for i, part in enumerate(parts):
        if num_bytes < len(part):
            return [memoryview(part)[num_bytes:], *parts[i + 1 :]]
        num_bytes -= len(part)
    return []


class Channel(Protocol):
    """How a rank reaches the coordinator, and hears of it."""

    def open(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        """Begin to hear: each message in order, and once that the coordinator is gone."""

    def send(self, message: Message) -> None:
        """Send a message, from any thread.

        Raises:
            OSError: the coordinator is gone.
        """

    def give_up(self) -> None:
        """End the `send` that waits now, or will have to."""

    def close(self) -> None:
        """Hear nothing more."""


class RemoteChannel:
    """Reaches a coordinator in another process.

    Args:
        address: host and port where it listens.
        rank: this rank.
        token: what it wants to hear.
    """

    def __init__(self, address: tuple[str, int], rank: int, token: str) -> None:
        self._line = Line(socket.create_connection(address))
        self._line.send({"rank": rank, "token": token})
        self._thread: threading.Thread | None = None

    def open(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        """Begin to hear, on a thread."""
        self._thread = threading.Thread(
            target=self._listen, args=(take, lose), name="dtkit-hvd", daemon=True
        )
        self._thread.start()

    def send(self, message: Message) -> None:
        """Send a message."""
        self._line.send(message)

    def give_up(self) -> None:
        """End the `send` that waits now, or will have to."""
        self._line.give_up()

    def close(self) -> None:
        """Hang up."""
        self._line.close()
        if self._thread is not None:
            self._thread.join()

    def _listen(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        try:
            while (messages := self._line.receive()) is not None:
                for message in messages:
                    take(message)
        finally:
            lose()
