"""Rank 0's coordinator, against ranks that die, take nothing or are no ranks at all."""

from __future__ import annotations

import os
import queue
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from dtkit.horovod.coordinator import Coordinator
from dtkit.horovod.patience import Patience
from dtkit.horovod.timeline import Timeline
from dtkit.horovod.wire import Line, RemoteChannel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dtkit.horovod.wire import Message

TOKEN = "token"  # noqa: S105  of this test
PAYLOAD = bytes(1 << 16)


class Job:
    """A coordinator of two ranks; rank 0 is the test."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self.coordinator = Coordinator(listener, 2, TOKEN, Patience(), self.combined)
        self.channel = self.coordinator.own_channel()
        self.heard: queue.Queue[Message | None] = queue.Queue()
        self.channel.open(self.heard.put, lambda: self.heard.put(None))
        self.during = lambda: None
        """Called while payloads are combined."""

    def combined(self, _meta: Message, payloads: list[memoryview]) -> memoryview:
        self.during()
        return payloads[0]

    def submit(self, name: str, payload: bytes = PAYLOAD) -> None:
        self.channel.send(submission(name, payload))

    def line(self) -> Line:
        """Return rank 1's end, which hears nothing unless it is asked."""
        line = Line(socket.create_connection(self.address))
        line.send({"rank": 1, "token": TOKEN})
        return line

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.address)

    def answer(self) -> Message | None:
        return self.heard.get(timeout=30)


def submission(name: str, payload: bytes = PAYLOAD) -> Message:
    return {
        "do": "submit", "set": 0, "name": name, "meta": {"kind": "allreduce"}, "extra": None,
        "payload": memoryview(bytearray(payload)),
    }  # fmt: skip


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job()
    yield job
    job.channel.send({"do": "leave"})
    job.coordinator.wait()


def reset(line: Line) -> None:
    """End a connection as the system does for a process that was killed."""
    line.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.connection.close()


@pytest.mark.parametrize(
    "said",
    [
        b"[" * 100_000 + b"\n", b"x" * (1 << 20),
        '{"token":"\u00e9"}\n'.encode(), b'{"token":"\\ud800"}\n',
    ],
)  # fmt: skip
def test_who_is_no_rank_is_hung_up_on_and_the_ranks_go_on(job: Job, said: bytes) -> None:
    with job.stranger() as stranger:
        try:
            stranger.sendall(said)
            assert stranger.recv(1) == b""
        except ConnectionError:  # it hung up before all was said
            pass
    line = job.line()
    line.send(submission("a"))
    job.submit("a")
    answer = job.answer()
    assert answer is not None
    assert answer["payload"] == PAYLOAD
    line.close()


def test_a_rank_that_takes_nothing_and_then_dies_is_lost_as_any_other(job: Job) -> None:
    line = job.line()
    num = 400
    sender = threading.Thread(target=lambda: [line.send(submission(f"a{i}")) for i in range(num)])
    sender.start()

    def submit_all() -> None:
        for i in range(num):
            job.submit(f"a{i}")

    submitter = threading.Thread(target=submit_all, daemon=True)
    submitter.start()
    answers = [job.answer() for _ in range(num)]
    assert all(answer is not None and "payload" in answer for answer in answers)
    submitter.join()
    sender.join()
    reset(line)
    assert job.answer() == {"broken": "rank 1 is gone: its process ended"}


def test_a_rank_that_dies_while_it_is_answered_is_lost_too(job: Job) -> None:
    line = job.line()
    line.send(submission("a"))
    line.send(submission("b"))
    job.during = lambda: reset(line)
    job.submit("a")
    assert job.answer() is not None
    job.during = lambda: None
    job.submit("c")
    answer = job.answer()
    while answer is not None and "error" not in answer:
        answer = job.answer()
    assert answer is not None
    assert answer["error"] == "rank 1 is gone: its process ended"


def test_an_interrupt_in_the_middle_of_an_answer_ends_the_waits_of_all(job: Job) -> None:
    told: queue.Queue[Message] = queue.Queue()
    channel = RemoteChannel(job.address, 1, TOKEN)
    channel.open(told.put, lambda: None)
    channel.send(submission("a"))
    channel.send(submission("b"))
    job.submit("b")
    assert "payload" in told.get(timeout=30)  # and so "a" of rank 1 is there too
    assert job.answer() is not None

    def interrupt() -> None:
        raise KeyboardInterrupt

    job.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        job.submit("a")
    assert told.get(timeout=30) == job.answer() == {"broken": "rank 0 was interrupted"}
    channel.close()


def test_a_timeline_that_cannot_be_written_ends_and_nothing_else(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "timeline"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    job.coordinator.timeline = timeline = Timeline(str(path))
    os.close(reader)
    line = job.line()
    line.send(submission("a"))
    job.submit("a")
    assert job.answer() is not None
    timeline.close()
    line.close()
    assert capsys.readouterr().err == "hvd: the timeline ends here: [Errno 32] Broken pipe\n"
