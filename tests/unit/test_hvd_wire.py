"""What comes over the connection on which Horovod's ranks agree."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from dtkit.horovod.wire import Line

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Line]]:
    """What somebody sends from, and the line that hears it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        line = Line(server.accept()[0])
    with sender:
        yield sender, line
        line.close()


def test_messages_come_whole_however_they_are_cut(ends: tuple[socket.socket, Line]) -> None:
    sender, line = ends
    sender.sendall(b'{"do":"wait"}\n{"do"')
    assert line.receive() == [{"do": "wait"}]
    sender.sendall(b':"leave"}\n')
    assert line.receive() == [{"do": "leave"}]


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\xfe\n"])
def test_what_is_no_message_ends_the_connection_and_nothing_else(
    ends: tuple[socket.socket, Line], said: bytes
) -> None:
    sender, line = ends
    sender.sendall(said)
    assert line.receive() is None
