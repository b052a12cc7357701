"""Carrying objects between this rank and the driver."""

from __future__ import annotations

import itertools
import socket
from typing import Any

from dtkit.chunks import Exported, block_of, bytes_of, send_chunks
from dtkit.engine.parallel.pieces import Pieces
from dtkit.engine.process.shell import current_shell
from dtkit.errors import did_you_mean
from dtkit.packing import pack, receive, send, unpack

__all__ = [
    "accept",
    "drop",
    "export",
    "lookup",
    "read",
    "read_block",
    "receive_from",
    "send_parts_to",
    "send_to",
]

# Any: the user's own objects.

_NUMBERS = itertools.count()


_EXPORTED: dict[int, tuple[list[memoryview], list[Any]]] = {}
"""Buffers and parts that the driver has been told of and has not taken yet, by number."""


def export(name: str) -> Exported:
    """Make the object called `name` ready; classes defined in cells go along by value.

    A name may have attributes: `model.head`. Tensors, and modules with all their
    tensors, arrive on the CPU; the rank's own object is unchanged.

    Raises:
        NameError: there is no such name.
        TypeError: it cannot be pickled.
    """
    value = lookup(name)
    pieces = Pieces()
    try:
        head, buffers = pack(value, pieces.reduce)
    except Exception as error:
        msg = f"{name} ({type(value).__name__}) cannot be carried: {error}"
        raise TypeError(msg) from error
    number = next(_NUMBERS)
    _EXPORTED[number] = buffers, pieces.parts
    sizes = [buffer.nbytes for buffer in buffers]
    return Exported(number, head, sizes, pieces.wholes, pieces.chunks, sorted(pieces.ranks))


def send_to(path: str, number: int) -> None:
    """Send an exported object's buffers to the driver's socket, from where they lie."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        send(connection, _EXPORTED[number][0])


def send_parts_to(path: str, number: int, wanted: list[int]) -> None:
    """Send some of the parts of an exported object's tensors to the driver's socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        send_chunks(connection, [_EXPORTED[number][1][index] for index in wanted])


def read(number: int, index: int, start: int, stop: int) -> bytes:
    """Return a piece of one of an exported object's buffers."""
    return bytes(_EXPORTED[number][0][index][start:stop])


def read_block(number: int, index: int, block: int) -> bytes:
    """Return a block of one of the parts of an exported object's tensors."""
    return bytes(bytes_of(block_of(_EXPORTED[number][1][index], block)))


def drop(number: int) -> None:
    """Let go of an exported object."""
    _EXPORTED.pop(number, None)


def accept(name: str, head: bytes, buffers: list[bytes]) -> None:
    """Put an object into the namespace under `name`."""
    current_shell().user_ns[name] = unpack(head, [bytearray(b) for b in buffers])


def receive_from(path: str, name: str, head: bytes, sizes: list[int]) -> None:
    """Put an object into the namespace whose buffers come from the driver's socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        current_shell().user_ns[name] = unpack(head, receive(connection, sizes))


def lookup(name: str) -> Any:
    """Return the object called `name`, which may have attributes: `model.head`."""
    first, *rest = name.split(".")
    namespace = current_shell().user_ns
    if first not in namespace:
        hint = did_you_mean(first, [known for known in namespace if not known.startswith("_")])
        hint = hint or "names live there after a cell has made them"
        msg = f"no {first!r} on this rank; {hint}"
        raise NameError(msg)
    value = namespace[first]
    for attribute in rest:
        value = getattr(value, attribute)
    return value
