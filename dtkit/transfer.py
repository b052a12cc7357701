"""Objects between the driver and the ranks: a small message, and the large buffers beside it.

On this host the buffers go through a socket in a folder of mode 0700, out of the
memory that they lie in and into that in which they stay: nothing is held twice.
From another host they come in pieces over ipyparallel's channel.
"""

from __future__ import annotations

import platform
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dtkit.errors import InvalidInputError, RankError
from dtkit.packing import pack, receive, send, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dtkit.cluster import Engines

__all__ = ["Transfer", "pull", "push"]

# Any, below: the user's own objects.

_ENGINE = "dtkit.engine.transfer"
_PIECE = 32 << 20
_SMALL = 1 << 20
"""What is smaller goes along with the message."""
_SPARE = 0.9
"""Of the free memory: a system that has used all of it ends processes."""
_SLOWEST = 20e6
"""Bytes a second; a transfer that is slower has come to a stop."""
_STALL_S = 60.0
"""A rank that neither sends nor takes anything for so long is given up."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Transfer:
    """An object that was carried, with its size and the time it took."""

    name: str
    value: Any
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {_size(self.num_bytes)} in {self.seconds:.2f} s"


def pull(engines: Engines, name: str, rank: int, *, host: str) -> Transfer:
    """Bring an object from a rank; tensors and modules arrive on the CPU.

    Args:
        engines: all of them.
        name: of the object, on the rank.
        rank: whose.
        host: where the rank lives.

    Raises:
        InvalidInputError: there is no such name on the rank, it cannot be
            carried, or this process has no memory for it.
    """
    begun_s = time.monotonic()
    try:
        number, head, sizes = engines.call(f"{_ENGINE}:export", (name,), ranks=[rank])[rank]
    except RankError as error:
        raise InvalidInputError(error.failures[0].evalue) from None
    try:
        _check_room(name, sum(sizes))
        if host == platform.node() and sum(sizes) > _SMALL:
            buffers = _pull_here(engines, rank, number, sizes)
        else:
            buffers = [_pull_piece(engines, rank, number, i, n) for i, n in enumerate(sizes)]
    finally:
        engines.call(f"{_ENGINE}:drop", (number,), ranks=[rank])
    seconds = time.monotonic() - begun_s
    return Transfer(name, unpack(head, buffers), len(head) + sum(sizes), seconds)


def push(
    engines: Engines, name: str, value: Any, ranks: Sequence[int], *, hosts: Mapping[int, str]
) -> Transfer:
    """Put an object into the namespace of ranks; tensors arrive on the CPU.

    Raises:
        InvalidInputError: it cannot be pickled.
    """
    begun_s = time.monotonic()
    try:
        head, buffers = pack(value)
    except Exception as error:
        msg = f"{name} cannot be sent: {type(error).__name__}: {error}"
        raise InvalidInputError(msg) from error
    sizes = [buffer.nbytes for buffer in buffers]
    here = [r for r in ranks if hosts[r] == platform.node() and sum(sizes) > _SMALL]
    others = [rank for rank in ranks if rank not in here]
    if here:
        with _serving(lambda connection: send(connection, buffers)) as path:
            args = (path, name, head, sizes)
            engines.call(f"{_ENGINE}:receive_from", args, ranks=here, timeout_s=_bound_s(sizes))
    if others:
        args = (name, head, [bytes(buffer) for buffer in buffers])  # type: ignore[assignment]
        engines.call(f"{_ENGINE}:accept", args, ranks=others, timeout_s=_bound_s(sizes))
    return Transfer(name, value, len(head) + sum(sizes), time.monotonic() - begun_s)


def _pull_here(engines: Engines, rank: int, number: int, sizes: list[int]) -> list[Any]:
    received: list[Any] = []
    with _serving(lambda connection: received.extend(receive(connection, sizes))) as path:
        engines.call(f"{_ENGINE}:send_to", (path, number), ranks=[rank], timeout_s=_bound_s(sizes))
    return received


def _pull_piece(engines: Engines, rank: int, number: int, index: int, size: int) -> bytearray:
    buffer = bytearray(size)
    for start in range(0, size, _PIECE):
        stop = min(size, start + _PIECE)
        args = (number, index, start, stop)
        buffer[start:stop] = engines.call(f"{_ENGINE}:read", args, ranks=[rank])[rank]
    return buffer


@contextmanager
def _serving(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Let processes of this user connect to the yielded path, and serve each in a thread.

    Leaving the context waits for those that are being served, and raises what one failed with.
    """
    errors: list[Exception] = []
    threads: list[threading.Thread] = []
    is_over = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        try:
            with connection:
                serve(connection)
        except Exception as error:  # noqa: BLE001  raised below, where the caller is
            errors.append(error)

    def listen() -> None:
        while not is_over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(_STALL_S)
            threads.append(threading.Thread(target=serve_one, args=(connection,), daemon=True))
            threads[-1].start()

    with (
        tempfile.TemporaryDirectory(prefix="dtkit-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = str(Path(folder) / "socket")
        listener.bind(path)
        listener.listen()
        listener.settimeout(_POLL_S)
        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        try:
            yield path
        finally:
            is_over.set()
            listening.join()
            for thread in threads:
                thread.join()
    if errors:
        raise errors[0]


def _bound_s(sizes: Sequence[int]) -> float:
    return 60.0 + sum(sizes) / _SLOWEST


def _check_room(name: str, num_bytes: int) -> None:
    free = psutil.virtual_memory().available
    if num_bytes > _SPARE * free:
        msg = (
            f"{name} has {_size(num_bytes)}, and {_size(free)} are free in this host's memory: "
            f"pull a part of it (such as {name}.head), or save it where it is with "
            "dtkit.checkpoint"
        )
        raise InvalidInputError(msg)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:  # noqa: PLR2004
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
