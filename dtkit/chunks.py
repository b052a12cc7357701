"""Tensors of which every rank holds a part: put together in place, a few MiB at a time.

Used on both sides of a transfer: the rank sends blocks of its parts, from where
they lie, and the driver receives each into its place in the whole tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtkit.packing import receive_into

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

__all__ = [
    "Chunk",
    "Exported",
    "Whole",
    "block_of",
    "bytes_of",
    "num_blocks",
    "place_block",
    "receive_chunks",
    "send_chunks",
]

# Any, throughout: torch's tensors; torch is loaded only where there are some.

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that the ranks hold together.

    Attributes:
        shape: of all of it.
        dtype: its name in torch.
        num_bytes: of all of it.
        requires_grad: whether it is trained.
        is_param: whether it is a parameter.
    """

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    requires_grad: bool
    is_param: bool

    def empty(self) -> Any:
        """Return a tensor to put the parts into."""
        import torch

        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))

    def finished(self, tensor: Any) -> Any:
        """Return the tensor as what it is in the model."""
        import torch

        if self.is_param:
            return torch.nn.Parameter(tensor, requires_grad=self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor.

    Attributes:
        number: of the tensor.
        offset: where in the whole it begins, along each dimension.
        shape: its own.
    """

    number: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def place(self, whole: Any) -> Any:
        """Return the view of the whole tensor that the part belongs into."""
        return whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))]


@dataclass(frozen=True, slots=True)
class Exported:
    """What the driver is told of an object that it has asked for.

    Attributes:
        number: to ask for it with.
        head: its pickle.
        sizes: in bytes, of its buffers.
        wholes: its tensors that other ranks have parts of, too.
        chunks: the parts that this rank has.
        ranks: who has parts of them.
    """

    number: int
    head: bytes
    sizes: list[int]
    wholes: list[Whole]
    chunks: list[Chunk]
    ranks: list[int]


def send_chunks(connection: socket.socket, parts: Sequence[Any]) -> None:
    """Send parts of tensors, one after the other."""
    for part in parts:
        for block in _blocks(part):
            connection.sendall(bytes_of(block))


def receive_chunks(
    connection: socket.socket, chunks: Sequence[Chunk], wholes: Sequence[Any]
) -> None:
    """Receive parts of tensors into their places."""
    for chunk in chunks:
        for place in _blocks(chunk.place(wholes[chunk.number])):
            if place.is_contiguous():
                receive_into(connection, bytes_of(place))
                continue
            block = place.new_empty(place.shape)
            receive_into(connection, bytes_of(block))
            place.copy_(block)


def num_blocks(part: Any) -> int:
    """Return into how many blocks a part is cut."""
    rows, num_rows = _cut(part)
    return -(-rows.shape[0] // num_rows) if rows.numel() else 0


def block_of(part: Any, index: int) -> Any:
    """Return one of them."""
    rows, num_rows = _cut(part)
    return rows[index * num_rows : (index + 1) * num_rows]


def place_block(place: Any, index: int, data: bytes) -> None:
    """Put a block that came as bytes into its place in the view of a whole tensor."""
    import torch

    target = block_of(place, index)
    flat = torch.frombuffer(bytearray(data), dtype=target.dtype)
    target.copy_(flat.reshape(target.shape))


def bytes_of(block: Any) -> memoryview:
    """Return a block's bytes; those of its own memory if it is on the CPU and contiguous."""
    import torch

    flat = block.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


def _blocks(part: Any) -> Iterator[Any]:
    for index in range(num_blocks(part)):
        yield block_of(part, index)


def _cut(part: Any) -> tuple[Any, int]:
    """Return a tensor's rows, and how many at a time make a block; both sides cut alike."""
    rows = part.detach() if part.dim() else part.detach().reshape(1)
    num_bytes = rows.numel() * rows.element_size()
    return rows, max(1, _BLOCK * rows.shape[0] // max(1, num_bytes))
