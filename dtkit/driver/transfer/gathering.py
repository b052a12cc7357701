"""Tensors that several ranks hold together, put together on the driver.

No rank ever has one whole, and nothing is held twice here: each part goes to its
place in the whole tensor as it comes. The ranks need no process group for it.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from dtkit.chunks import num_blocks, place_block, receive_chunks
from dtkit.driver.transfer.serving import bound_s, serving
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dtkit.chunks import Chunk, Exported
    from dtkit.cluster import Engines

__all__ = ["gather_wholes"]

# Any, below: tensors; torch is loaded only where there are some.

_ENGINE = "dtkit.engine.process.transfer"


def gather_wholes(
    engines: Engines, name: str, exported: Mapping[int, Exported], hosts: Mapping[int, str]
) -> list[Any]:
    """Return the tensors of an object that the ranks hold together.

    Raises:
        InvalidInputError: the ranks have different objects of this name, or a part is missing.
    """
    described = next(iter(exported.values())).wholes
    for rank, found in exported.items():
        if found.wholes != described:
            msg = f"{name} is another object on rank {rank}: not the same model's parts"
            raise InvalidInputError(msg)
    wanted = _shares(exported)
    counts = [0] * len(described)
    for chunk in (exported[r].chunks[i] for r, indexes in wanted.items() for i in indexes):
        counts[chunk.number] += chunk.numel
    wholes = [whole.empty() for whole in described]
    if any(tensor.numel() != num for tensor, num in zip(wholes, counts, strict=True)):
        msg = f"{name}: some of its parts are on no rank any more"
        raise InvalidInputError(msg)
    for rank, indexes in wanted.items():
        fetch = _receive if hosts[rank] == platform.node() else _read
        fetch(engines, rank, exported[rank], indexes, wholes)
    return [kind.finished(tensor) for kind, tensor in zip(described, wholes, strict=True)]


def _shares(exported: Mapping[int, Exported]) -> dict[int, list[int]]:
    """Return which of its chunks each rank is to send: of copies, the first."""
    seen: set[Chunk] = set()
    wanted: dict[int, list[int]] = {}
    for rank, found in exported.items():
        for index, chunk in enumerate(found.chunks):
            if chunk not in seen:
                seen.add(chunk)
                wanted.setdefault(rank, []).append(index)
    return wanted


def _receive(
    engines: Engines, rank: int, found: Exported, indexes: list[int], wholes: list[Any]
) -> None:
    chunks = [found.chunks[i] for i in indexes]
    sizes = [chunk.numel * wholes[chunk.number].element_size() for chunk in chunks]
    with serving(lambda connection: receive_chunks(connection, chunks, wholes)) as path:
        args = (path, found.number, indexes)
        engines.call(f"{_ENGINE}:send_parts_to", args, ranks=[rank], timeout_s=bound_s(sizes))


def _read(
    engines: Engines, rank: int, found: Exported, indexes: list[int], wholes: list[Any]
) -> None:
    for index in indexes:
        chunk = found.chunks[index]
        place = chunk.place(wholes[chunk.number])
        for block in range(num_blocks(place)):
            args = (found.number, index, block)
            data = engines.call(f"{_ENGINE}:read_block", args, ranks=[rank])[rank]
            place_block(place, block, data)
