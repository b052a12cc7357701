"""Collectives that move: gather, broadcast, all-to-all, with sizes that may differ by rank.

All travel as bytes, since gloo does not know every dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.horovod.wire import Message

__all__ = [
    "AllGather",
    "AllToAll",
    "Broadcast",
    "Nothing",
    "Room",
    "Started",
    "concatenated",
    "split_like",
]


class Started(ABC):
    """A collective that torch.distributed has under way; see `controller.Collective`.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.meta: Message = {}
        self.extra: Any = None
        self.payload: memoryview | None = None
        self._works: list[dist.Work] = []
        self._ready: tuple[torch.cuda.Event, int] | None = None

    def prepare(self, eager_bytes: int) -> None:  # noqa: ARG002  what moves has no payload
        """Note where the submitting thread's stream is, which fills the tensors."""
        if torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record()
            self._ready = event, torch.cuda.current_device()

    def launch(self, answer: Message) -> None:
        """Start, after what this rank's GPU still has to compute for it.

        The thread that does so has a stream of its own, which must not run ahead.
        """
        if self._ready is not None:
            event, device = self._ready
            torch.cuda.current_stream(device).wait_event(event)
        self.start(answer)

    @abstractmethod
    def start(self, answer: Message) -> None:
        """Start the works."""

    @abstractmethod
    def collect(self) -> Any:
        """Return the result."""

    def add(self, work: dist.Work | None) -> None:
        """Note a work that `finish` waits for."""
        if work is not None:
            self._works.append(work)

    def is_done(self) -> bool:
        """Return whether `finish` would not wait."""
        return all(work.is_completed() for work in self._works)

    def finish(self) -> Any:
        """Wait for the works and return the result."""
        for work in self._works:
            work.wait()
        return self.collect()


class Nothing(Started):
    """A collective whose whole point is that all ranks agree: barrier, join, process sets."""

    def __init__(self, kind: str, **meta: Any) -> None:
        self.meta: Message = {"kind": kind, **meta}
        self.extra: Any = None
        self.payload = None
        self._works = []
        self._ready = None
        self._answer: Message = {}

    def start(self, answer: Message) -> None:
        """Take note of what was agreed on."""
        self._answer = answer

    def collect(self) -> Message:
        """Return what was agreed on."""
        return self._answer


class AllGather(Started):
    """Lays the tensors of all ranks end to end, along the first dimension."""

    def __init__(self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._tensors = [t.detach() for t in tensors]
        self.extra: Any = [t.shape[0] for t in tensors]
        self.meta: Message = {"kind": "allgather", **_kinds(tensors, first_dim=1)}
        self._parts: list[tuple[torch.Tensor, list[int]]] = []

    def start(self, answer: Message) -> None:
        """Start one gather for each tensor."""
        for i, tensor in enumerate(self._tensors):
            rows = [extra[i] for extra in answer["extras"]]
            mine = _as_bytes(tensor)
            width = max(rows) * _row_bytes(tensor)
            if mine.numel() < width:
                mine = torch.cat([mine, mine.new_zeros(width - mine.numel())])
            everyones = mine.new_empty((len(rows), width))
            if width:
                parts = list(everyones.unbind())
                self.add(dist.all_gather(parts, mine, group=self.group, async_op=True))
            self._parts.append((everyones, rows))

    def collect(self) -> list[torch.Tensor]:
        """Return the gathered tensors."""
        return [
            _from_bytes(
                torch.cat([
                    row[: n * _row_bytes(t)] for row, n in zip(everyones, rows, strict=True)
                ]),
                t,
                sum(rows),
            )
            for t, (everyones, rows) in zip(self._tensors, self._parts, strict=True)
        ]  # fmt: skip

    @property
    def rows(self) -> list[list[int]]:
        """How many rows came from each rank, for each tensor."""
        return [rows for _, rows in self._parts]


class Broadcast(Started):
    """Gives all ranks one rank's tensor.

    Args:
        tensor: sent on the root, of the same shape elsewhere.
        root: a rank of the whole job.
        group: the ranks.
        output: where it goes.
    """

    def __init__(
        self, tensor: torch.Tensor, root: int, group: dist.ProcessGroup, output: torch.Tensor
    ) -> None:
        super().__init__(group)
        self._output = output.detach()
        self._root = root
        self._bytes = _as_bytes(tensor.detach() if dist.get_rank() == root else self._output)
        self.meta: Message = {"kind": "broadcast", "root": root, **_kinds([tensor], first_dim=0)}

    def start(self, _answer: Message) -> None:
        """Start."""
        if self._bytes.numel():
            self.add(dist.broadcast(self._bytes, self._root, group=self.group, async_op=True))

    @torch.no_grad()
    def collect(self) -> torch.Tensor:
        """Return the root's tensor."""
        if self._bytes.data_ptr() != self._output.data_ptr():
            self._output.copy_(_from_bytes(self._bytes, self._output, None))
        return self._output


class AllToAll(Started):
    """Sends each rank some rows of a tensor.

    Args:
        tensor: the rows for rank 0, then those for rank 1, and so on.
        splits: how many rows each rank gets.
        group: the ranks.
    """

    def __init__(
        self, tensor: torch.Tensor, splits: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        super().__init__(group)
        self._tensor = tensor.detach()
        self._splits = list(splits)
        self.extra: Any = self._splits
        self.meta: Message = {"kind": "alltoall", **_kinds([tensor], first_dim=1)}
        self._output = torch.empty(0)
        self.received: list[int] = []

    def start(self, answer: Message) -> None:
        """Start."""
        me, row = self.group.rank(), _row_bytes(self._tensor)
        self.received = [extra[me] for extra in answer["extras"]]
        mine = _as_bytes(self._tensor)[: sum(self._splits) * row]
        self._output = mine.new_empty((sum(self.received) * row,))
        if any(n for extra in answer["extras"] for n in extra) and row:
            self.add(dist.all_to_all_single(
                self._output, mine, [n * row for n in self.received],
                [n * row for n in self._splits], group=self.group, async_op=True,
            ))  # fmt: skip

    def collect(self) -> tuple[torch.Tensor, list[int]]:
        """Return the rows that came, and how many from each rank."""
        return _from_bytes(self._output, self._tensor, sum(self.received)), self.received


def concatenated(
    tensors: Sequence[torch.Tensor], *, may_alias: bool, room: Room | None = None
) -> torch.Tensor:
    """Return the tensors laid end to end, in `room`; a single one itself, if that is allowed."""
    if len(tensors) > 1:
        out = None if room is None else room.for_all(tensors)
        return torch.cat([t.reshape(-1) for t in tensors], out=out)
    flat = tensors[0].reshape(-1).resolve_conj().resolve_neg()  # a copy if it must be
    is_copy = flat.data_ptr() != tensors[0].data_ptr()
    if (is_copy or may_alias) and flat.stride(0) == 1:  # not that of a column
        return flat
    return flat.clone(memory_format=torch.contiguous_format)


class Room:
    """Memory for tensors laid end to end, used again by the next collective of the same tensors.

    To fill 1.2 MB of fresh memory takes six times as long: the system hands it out page by page.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def for_all(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a flat tensor that holds these, which have one dtype and device."""
        key = (tensors[0].dtype, tensors[0].device)
        num = sum(t.numel() for t in tensors)
        flat = self._flat.get(key)
        if flat is None or flat.numel() != num:
            flat = self._flat[key] = tensors[0].new_empty(num)
        return flat


def split_like(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of a flat tensor, shaped like these."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _kinds(tensors: Sequence[torch.Tensor], *, first_dim: int) -> Message:
    return {
        "dtype": [str(t.dtype).removeprefix("torch.") for t in tensors],
        "shape": [list(t.shape)[first_dim:] for t in tensors],
        "dims": [t.dim() for t in tensors],
        "device": [t.device.type for t in tensors],
    }


def _row_bytes(tensor: torch.Tensor) -> int:
    return prod(tensor.shape[1:]) * tensor.element_size()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one element, expanded: that counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _from_bytes(flat: torch.Tensor, like: torch.Tensor, rows: int | None) -> torch.Tensor:
    shape = like.shape if rows is None else (rows, *like.shape[1:])
    if flat.data_ptr() % like.element_size():
        flat = flat.clone()
    return flat.view(like.dtype).view(shape)
