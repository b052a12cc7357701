"""Collectives that compute: all-reduce with Horovod's operations, and reduce-scatter."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.engine.reduce.wire import num_gathered_bytes, num_reduced_bytes
from dtkit.horovod.adasum import adasum
from dtkit.horovod.movement import Started, concatenated, split_like

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dtkit.horovod.movement import Room
    from dtkit.horovod.wire import Message

__all__ = ["AllReduce", "Gathered", "Op", "ReduceScatter", "added", "zeros_for"]


class Op(Enum):
    """How tensors are combined; the values are Horovod's."""

    AVERAGE = 0
    SUM = 1
    ADASUM = 2
    MIN = 3
    MAX = 4
    PRODUCT = 5


_HALF = (torch.float16, torch.bfloat16)
_EAGER = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.uint8, torch.int8, torch.int32, torch.int64,
)  # fmt: skip
"""What gloo adds up, too: small tensors shall not be able to do what large ones cannot."""
_REDUCE = {
    Op.AVERAGE: dist.ReduceOp.SUM,
    Op.SUM: dist.ReduceOp.SUM,
    Op.MIN: dist.ReduceOp.MIN,
    Op.MAX: dist.ReduceOp.MAX,
    Op.PRODUCT: dist.ReduceOp.PRODUCT,
}


class AllReduce(Started):
    """Combines tensors of all ranks of a group, several of them as one.

    Args:
        tensors: what this rank contributes.
        op: how they are combined.
        group: the ranks.
        scales: factors before and after.
        outputs: where the results go; None: into new tensors.
        mark: told to all ranks along with it.
        spent: which of the tensors may be written to, beside those that are outputs.
        room: where they are laid out; results without outputs lie there, until it is used again.
    """

    kind = "allreduce"

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        op: Op,
        group: dist.ProcessGroup,
        *,
        scales: tuple[float, float] = (1.0, 1.0),
        outputs: Sequence[torch.Tensor] | None = None,
        mark: Any = None,
        spent: Collection[int] = (),
        room: Room | None = None,
    ) -> None:
        super().__init__(group)
        self._room = room
        self._tensors = [t.detach() for t in tensors]
        self._spent = spent
        self._outputs = None if outputs is None else [o.detach() for o in outputs]
        self._op = op
        self._scales = scales
        self.marks: list[Any] = []
        self.extra = mark
        self.meta: Message = {
            "kind": self.kind,
            "dtype": [str(t.dtype).removeprefix("torch.") for t in tensors],
            "shape": [list(t.shape) for t in tensors],
            "device": [t.device.type for t in tensors],
            "op": op.name.lower(),
            "scale": [float(scale) for scale in scales],  # NumPy's are no JSON
        }
        self._buffers: list[tuple[list[int], torch.Tensor]] = []
        self._gathered: list[list[torch.Tensor]] = []
        self._fill()

    def prepare(self, eager_bytes: int) -> None:
        """Let small tensors travel along with the submission: an eager protocol, as MPI has it.

        Rank 0 adds them up and answers with the sum: once there and back, and no threads of gloo.
        """
        super().prepare(eager_bytes)
        is_sum = self._op in (Op.AVERAGE, Op.SUM) and "is_gathered" not in self.meta
        if len(self._buffers) != 1 or not is_sum:
            return
        ((_, buffer),) = self._buffers
        num_bytes = buffer.nbytes * (self.group.size() - 1)
        if buffer.is_cpu and buffer.dtype in _EAGER and 0 < num_bytes <= eager_bytes:
            self.payload = buffer.view(torch.uint8).numpy().data
            self.meta["way"] = "eager"  # the last word that is compared

    def start(self, answer: Message) -> None:
        """Start one collective for each dtype."""
        self.marks = answer["extras"]
        if "payload" in answer:
            ((members, buffer),) = self._buffers
            self._buffers = [(members, torch.frombuffer(answer["payload"], dtype=buffer.dtype))]
            return
        for _, buffer in self._buffers:
            if not buffer.numel():
                continue
            if self._op is Op.ADASUM:
                rows = list(buffer.new_empty((self.group.size(), buffer.numel())).unbind())
                self._gathered.append(rows)
                self.add(dist.all_gather(rows, buffer, group=self.group, async_op=True))
            else:
                self.add(
                    dist.all_reduce(buffer, _REDUCE[self._op], group=self.group, async_op=True)
                )

    def num_bytes_sent(self) -> float:
        """Return what this rank sends; known once it is submitted."""
        num_bytes = sum(buffer.nbytes for _, buffer in self._buffers)
        if self.payload is not None:  # rank 0 sends the others what it has combined
            return num_bytes * (1 if dist.get_rank() else self.group.size() - 1)
        is_gathered = self._op is Op.ADASUM or "is_gathered" in self.meta
        count = num_gathered_bytes if is_gathered else num_reduced_bytes
        return count(num_bytes, self.group.size())

    @torch.no_grad()
    def collect(self) -> list[torch.Tensor]:
        """Return the combined tensors."""
        results: dict[int, torch.Tensor] = {}
        gathered = iter(self._gathered)
        for members, buffer in self._buffers:
            if self._op is Op.ADASUM and buffer.numel():
                self._combine(members, buffer, next(gathered))
            whole = self._scaled_after(buffer)
            shapes = [self._tensors[i] for i in members]
            results.update(zip(members, split_like(whole, shapes), strict=True))
        found = [results[i] for i in range(len(self._tensors))]
        if self._outputs is None:
            return found
        for output, result in zip(self._outputs, found, strict=True):
            if output.data_ptr() != result.data_ptr():
                output.copy_(result)
        return self._outputs

    @torch.no_grad()
    def _fill(self) -> None:
        """Lay tensors of the same dtype end to end, in buffers that may be written to."""
        by_dtype: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, tensor in enumerate(self._tensors):
            by_dtype.setdefault((tensor.dtype, tensor.device), []).append(i)
        for members in by_dtype.values():
            tensors = [self._tensors[i] for i in members]
            may_alias = all(map(self._may_write_to, members))
            buffer = concatenated(tensors, may_alias=may_alias, room=self._room)
            self._buffers.append((members, scaled(buffer, self._factor_before(buffer))))

    def _may_write_to(self, i: int) -> bool:
        is_output = self._outputs is not None and (
            self._outputs[i].data_ptr() == self._tensors[i].data_ptr()
        )
        return is_output or i in self._spent

    def _factor_before(self, buffer: torch.Tensor) -> float:
        # Divided first: half precision may not hold the sum.
        is_divided = self._op is Op.AVERAGE and buffer.dtype in _HALF
        return self._scales[0] / (self.group.size() if is_divided else 1)

    def _combine(
        self, members: list[int], buffer: torch.Tensor, rows: Sequence[torch.Tensor]
    ) -> None:
        shapes = [self._tensors[i] for i in members]
        parts = [split_like(row, shapes) for row in rows]
        combined = [adasum([part[i] for part in parts]) for i in range(len(members))]
        buffer.copy_(torch.cat([c.reshape(-1) for c in combined]))

    def _scaled_after(self, buffer: torch.Tensor) -> torch.Tensor:
        whole = scaled(buffer, self._scales[1])
        if self._op is not Op.AVERAGE or buffer.dtype in _HALF:
            return whole
        if whole.is_floating_point() or whole.is_complex():
            return whole.div_(self.group.size())
        return whole.div_(self.group.size(), rounding_mode="trunc")


class Gathered(AllReduce):
    """Brings every rank's tensors to all, who add them up themselves: compressed gradients.

    Zeros, which a rank that has joined contributes, stand for zeros under every method.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], op: Op, group: dist.ProcessGroup, *, mark: Any = None
    ) -> None:
        super().__init__(tensors, op, group, mark=mark)
        self.meta["is_gathered"] = True

    def start(self, answer: Message) -> None:
        """Start a gather for each tensor."""
        self.marks: list[Any] = answer["extras"]
        ((_, buffer),) = self._buffers
        for piece in buffer.split([t.numel() for t in self._tensors]):
            rows = list(piece.new_empty((self.group.size(), piece.numel())).unbind())
            self._gathered.append(rows)
            self.add(dist.all_gather(rows, piece, group=self.group, async_op=True))

    def collect(self) -> list[torch.Tensor]:
        """Return what the ranks sent of each tensor, a row each."""
        return [torch.stack(rows) for rows in self._gathered]


class ReduceScatter(AllReduce):
    """Combines tensors and leaves each rank its part of the rows.

    Over the wire it is an all-reduce: gloo has no reduce-scatter of uneven parts.
    """

    kind = "reducescatter"

    def collect(self) -> list[torch.Tensor]:
        """Return this rank's rows; the first ranks have one more if they do not divide."""
        rank, size = self.group.rank(), self.group.size()
        mine = []
        for whole in super().collect():
            rows, more = divmod(whole.shape[0], size)
            first = rank * rows + min(rank, more)
            mine.append(whole[first : first + rows + (rank < more)].clone())
        return mine


def added(meta: Message, payloads: list[memoryview]) -> memoryview:
    """Return the sum of what ranks contribute, in the memory of the first one."""
    dtype = getattr(torch, meta["dtype"][0])
    total, *others = (torch.frombuffer(payload, dtype=dtype) for payload in payloads)
    for other in others:
        total.add_(other)
    return payloads[0]


def zeros_for(answer: Message, group: dist.ProcessGroup, device: torch.device) -> AllReduce:
    """Return what a rank that has joined contributes to the all-reduce of the others."""
    meta = answer["meta"]
    tensors = [
        torch.zeros(
            shape,
            dtype=getattr(torch, dtype),
            device=device if kind == device.type else kind,
        )
        for shape, dtype, kind in zip(meta["shape"], meta["dtype"], meta["device"], strict=True)
    ]
    kind = Gathered if meta.get("is_gathered") else AllReduce
    return kind(tensors, Op[meta["op"].upper()], group)


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor times the factor, in place where its dtype can hold the product.

    Half precision is multiplied as float32, integers as float64.
    """
    if factor == 1.0:
        return tensor
    if tensor.dtype in _HALF and tensor.is_cpu:
        return tensor.copy_(tensor.float() * factor)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.mul_(factor)
    return tensor.copy_(tensor.double() * factor)
