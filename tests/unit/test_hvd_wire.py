"""What comes over the connection on which Horovod's ranks agree."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import pytest

from dtkit.horovod.wire import MAX_PAYLOAD_BYTES, Line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.horovod.wire import Message


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


def test_payloads_come_whole_however_they_are_cut(ends: tuple[socket.socket, Line]) -> None:
    sender, line = ends
    sender.sendall(b'{"do":"submit","payload":6}\nab')
    assert line.receive() == []
    sender.sendall(b"c\nd")
    assert line.receive() == []
    sender.sendall(b'e{"payload":0}\n{"do":"wait"}\n')
    assert line.receive() == [{"do": "submit", "payload": b"abc\nde"}]
    assert line.receive() == [{"payload": b""}, {"do": "wait"}]


def test_what_the_other_end_does_not_take_waits_and_is_sent_as_it_was(
    ends: tuple[socket.socket, Line],
) -> None:
    sender, line = ends
    other = Line(sender)
    data = bytearray(b"a" * MAX_PAYLOAD_BYTES)
    num_posted = 1
    while line.post({"payload": memoryview(data)}):
        num_posted += 1
    data[:] = b"b" * len(data)
    line.post({"do": "wait"})
    found: list[Message] = []
    while len(found) <= num_posted:
        found += other.receive() or []
        line.post()
    *payloads, last = found
    assert all(message["payload"] == b"a" * len(data) for message in payloads)
    assert last == {"do": "wait"}
    assert line.post()


def test_who_is_interrupted_in_the_middle_of_a_message_hangs_up(
    ends: tuple[socket.socket, Line],
) -> None:
    sender, line = ends
    message = {"payload": memoryview(bytes(MAX_PAYLOAD_BYTES))}

    def interrupt(_signal: int, _frame: object) -> None:
        raise InterruptedError

    def fill() -> None:
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            line.send(message)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(InterruptedError):
            fill()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    other = Line(sender)
    heard = other.receive()
    while heard is not None:
        assert all(len(m["payload"]) == MAX_PAYLOAD_BYTES for m in heard)
        heard = other.receive()
    with pytest.raises(BrokenPipeError):
        line.send({"do": "wait"})


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\xfe\n", b'{"payload":-1}\n',
        b'{"payload":true}\n', b'{"payload":1e3}\n', b'{"payload":99999999999}\n',
    ],
)  # fmt: skip
def test_what_is_no_message_ends_the_connection_and_nothing_else(
    ends: tuple[socket.socket, Line], said: bytes
) -> None:
    sender, line = ends
    sender.sendall(said)
    assert line.receive() is None
