"""Between a rank and the coordinator: JSON messages over a socket, one a line.

No pickle on an open port.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Channel", "Line", "Message", "RemoteChannel"]

Message = dict[str, Any]  # Any: JSON

_CHUNK_BYTES = 1 << 16


class Line:
    """One end of a connection that carries messages.

    Args:
        connection: connected; closed with this object.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._lock = threading.Lock()
        self._rest = b""

    def send(self, message: Message) -> None:
        """Send a message, from any thread.

        Raises:
            OSError: the other end is gone.
        """
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self.connection.sendall(data)

    def receive(self) -> list[Message] | None:
        """Return the messages that are there, waiting for something; None at the end.

        What is no message is the end too: whoever finds the port may send anything.
        """
        try:
            data = self.connection.recv(_CHUNK_BYTES)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        is_sound = data and all(isinstance(message, dict) for message in messages)
        return messages if is_sound else None

    def close(self) -> None:
        """Close the connection; who waits in `receive`, on either end, gets None."""
        with contextlib.suppress(OSError):  # the other end was quicker
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Channel(Protocol):
    """How a rank reaches the coordinator, and hears of it."""

    def open(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        """Begin to hear: each message in order, and once that the coordinator is gone."""

    def send(self, message: Message) -> None:
        """Send a message, from any thread.

        Raises:
            OSError: the coordinator is gone.
        """

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

    def close(self) -> None:
        """Hang up."""
        self._line.close()
        if self._thread is not None:
            self._thread.join()

    def _listen(self, take: Callable[[Message], None], lose: Callable[[], None]) -> None:
        while (messages := self._line.receive()) is not None:
            for message in messages:
                take(message)
        lose()
