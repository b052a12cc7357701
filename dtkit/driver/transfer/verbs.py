"""Objects between the driver and the ranks: a small message, and the large buffers beside it.

On this host the buffers go through a socket in a folder of mode 0700, out of the
memory that they lie in and into that in which they stay: nothing is held twice.
From another host they come in pieces over ipyparallel's channel.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from dtkit._format import format_memory
from dtkit.driver.transfer.gathering import gather_wholes
from dtkit.driver.transfer.serving import bound_s, serving
from dtkit.errors import InvalidInputError, RankError
from dtkit.packing import pack, receive, send, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dtkit.chunks import Exported
    from dtkit.cluster import Engines

__all__ = ["Transfer", "pull", "push"]

# Any, below: the user's own objects.

_ENGINE = "dtkit.engine.process.transfer"
_PIECE = 32 << 20
_SMALL = 1 << 20
"""What is smaller goes along with the message."""
_SPARE = 0.9
"""Of the free memory: a system that has used all of it ends processes."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """An object that was carried, with its size and the time it took."""

    name: str
    value: Any
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {format_memory(self.num_bytes)} in {self.seconds:.2f} s"


def pull(engines: Engines, name: str, rank: int, *, hosts: Mapping[int, str]) -> Transfer:
    """Bring an object from a rank; tensors and modules arrive on the CPU.

    What several ranks hold together (a model that is sharded, split within its layers or
    cut into stages) arrives whole, as an object of the class that it had before.

    Args:
        engines: all of them.
        name: of the object, on the rank.
        rank: whose.
        hosts: where each rank lives.

    Raises:
        InvalidInputError: there is no such name on the rank, it cannot be
            carried, or this process has no memory for it.
    """
    begun_s = time.monotonic()
    exported = _export(engines, name, [rank])
    mine = exported[rank]
    try:
        num_bytes = sum(mine.sizes) + sum(whole.num_bytes for whole in mine.wholes)
        _check_room(name, num_bytes)
        others = [other for other in mine.ranks if other != rank]
        if others:
            exported |= _export(engines, name, others)
        wholes = gather_wholes(engines, name, exported, hosts)
        if hosts[rank] == platform.node() and sum(mine.sizes) > _SMALL:
            buffers = _pull_here(engines, rank, mine.number, mine.sizes)
        else:
            buffers = [
                _pull_piece(engines, rank, mine.number, i, n) for i, n in enumerate(mine.sizes)
            ]
    finally:
        for other, found in exported.items():
            engines.call(f"{_ENGINE}:drop", (found.number,), ranks=[other])
    seconds = time.monotonic() - begun_s
    value = unpack(mine.head, buffers, wholes)
    return Transfer(name, value, len(mine.head) + num_bytes, seconds)


def _export(engines: Engines, name: str, ranks: Sequence[int]) -> dict[int, Exported]:
    try:
        return engines.call(f"{_ENGINE}:export", (name,), ranks=ranks)
    except RankError as error:
        raise InvalidInputError(error.failures[0].evalue) from None


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
        with serving(lambda connection: send(connection, buffers)) as path:
            args = (path, name, head, sizes)
            engines.call(f"{_ENGINE}:receive_from", args, ranks=here, timeout_s=bound_s(sizes))
    if others:
        args = (name, head, [bytes(buffer) for buffer in buffers])  # type: ignore[assignment]
        engines.call(f"{_ENGINE}:accept", args, ranks=others, timeout_s=bound_s(sizes))
    return Transfer(name, value, len(head) + sum(sizes), time.monotonic() - begun_s)


def _pull_here(engines: Engines, rank: int, number: int, sizes: list[int]) -> list[Any]:
    received: list[Any] = []
    with serving(lambda connection: received.extend(receive(connection, sizes))) as path:
        engines.call(f"{_ENGINE}:send_to", (path, number), ranks=[rank], timeout_s=bound_s(sizes))
    return received


def _pull_piece(engines: Engines, rank: int, number: int, index: int, size: int) -> bytearray:
    buffer = bytearray(size)
    for start in range(0, size, _PIECE):
        stop = min(size, start + _PIECE)
        args = (number, index, start, stop)
        buffer[start:stop] = engines.call(f"{_ENGINE}:read", args, ranks=[rank])[rank]
    return buffer


def _check_room(name: str, num_bytes: int) -> None:
    free = psutil.virtual_memory().available
    if num_bytes > _SPARE * free:
        msg = (
            f"{name} has {format_memory(num_bytes)}, and {format_memory(free)} are free in this "
            "host's memory: "
            f"pull a part of it (such as {name}.head), or save it where it is with "
            "dtkit.checkpoint"
        )
        raise InvalidInputError(msg)
