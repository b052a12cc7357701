"""JSON messages over a socket, one a line: no pickle on an open port."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

__all__ = ["Line", "Message"]

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
        """Return the messages that are there, waiting for something; None at the end."""
        try:
            data = self.connection.recv(_CHUNK_BYTES)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close the connection; who waits in `receive`, on either end, gets None."""
        with contextlib.suppress(OSError):  # the other end was quicker
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
