"""Carrying objects between this rank and the driver."""

from __future__ import annotations

import itertools
import socket
from typing import Any

from dtkit.engine.shell import current_shell
from dtkit.packing import pack, receive, send, unpack

__all__ = ["accept", "drop", "export", "lookup", "read", "receive_from", "send_to"]

# Any: the user's own objects.

_NUMBERS = itertools.count()
_EXPORTED: dict[int, list[memoryview]] = {}
"""Buffers that the driver has been told of and has not taken yet, by number."""


def export(name: str) -> tuple[int, bytes, list[int]]:
    """Make the object called `name` ready; classes defined in cells go along by value.

    A name may have attributes: `model.head`. Tensors, and modules with all their
    tensors, arrive on the CPU; the rank's own object is unchanged.

    Returns:
        A number to ask for it with, its pickle, and the sizes in bytes of its buffers.

    Raises:
        NameError: there is no such name.
        TypeError: it cannot be pickled.
    """
    value = lookup(name)
    try:
        head, buffers = pack(value)
    except Exception as error:
        msg = f"{name} ({type(value).__name__}) cannot be carried: {error}"
        raise TypeError(msg) from error
    number = next(_NUMBERS)
    _EXPORTED[number] = buffers
    return number, head, [buffer.nbytes for buffer in buffers]


def send_to(path: str, number: int) -> None:
    """Send an exported object's buffers to the driver's socket, from where they lie."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        send(connection, _EXPORTED[number])


def read(number: int, index: int, start: int, stop: int) -> bytes:
    """Return a part of one of an exported object's buffers."""
    return bytes(_EXPORTED[number][index][start:stop])


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
        msg = f"no {first!r} on this rank; names live there after a cell has made them"
        raise NameError(msg)
    value = namespace[first]
    for attribute in rest:
        value = getattr(value, attribute)
    return value
