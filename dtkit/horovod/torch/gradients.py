"""Gradients of a `DistributedOptimizer`: reduced in rounds, finished inside `backward()`.

A parameter is *ready* once it got a gradient as often as a step wants. At the end
of a backward pass in which one became ready, all buckets are reduced that hold
parameters whose turn has not come yet; full ones have left during the pass. Each
rank says which of its parameters are ready, and those that were ready anywhere
are *done* everywhere. So ranks need not have used the same parameters, and agree
all the same on what is left. `finish`, before a step, goes on until all ranks are
there; what no rank has used is then zero.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.reduce.buckets import copy_all
from dtkit.engine.reduce.wire import num_gathered_bytes, num_reduced_bytes
from dtkit.horovod.context import Context, current
from dtkit.horovod.engine import sending, waited
from dtkit.horovod.reduction import AllReduce, Op
from dtkit.horovod.sets import number_of
from dtkit.horovod.torch.compressed import Compressed
from dtkit.horovod.torch.compression import Remembering
from dtkit.horovod.torch.scattering import sparse_allreduce_async
from dtkit.horovod.torch.slots import Bucket, Slot, dense, zero

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.engine.reduce.memory import Memory
    from dtkit.horovod.sets import ProcessSet
    from dtkit.horovod.torch.compression import Compressor

__all__ = ["Gradients", "HowToReduce"]

_TOO_OFTEN = (
    "Gradients were computed more than backward_passes_per_step times before a call to step(): "
    "raise backward_passes_per_step to accumulate them, or call optimizer.zero_grad() first"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToReduce:
    """The arguments of a `DistributedOptimizer` that say how gradients are combined."""

    op: Op
    compression: type[Compressor] | Remembering
    scales: tuple[float, float]
    sparse_as_dense: bool
    process_set: ProcessSet


class Gradients:
    """Reduces the gradients of some parameters.

    Args:
        buckets: names and parameters, those that are reduced together together.
        how: how they are combined.
        num_passes: backward passes per step; their gradients are summed.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[tuple[str, torch.Tensor]]],
        how: HowToReduce,
        num_passes: int,
    ) -> None:
        self._how = how
        self._num_passes = num_passes
        self._buckets = [
            Bucket(i, [Slot(name, param) for name, param in bucket])
            for i, bucket in enumerate(buckets)
        ]
        self._bucket_of = {id(s.param): (b, s) for b in self._buckets for s in b.slots}
        self.compressed: Compressed | None = None
        if isinstance(how.compression, Remembering):
            self.compressed = Compressed(how.compression, [s.param for s in self._slots()])
        self._pass: int | None = None
        self._number: tuple[Context, int] | None = None
        this = weakref.ref(self)  # a parameter must not keep alive what keeps it alive
        self._handles = [
            slot.param.register_post_accumulate_grad_hook(lambda param: _fire(this, param))
            for bucket in self._buckets
            for slot in bucket.slots
        ]
        weakref.finalize(self, _remove, self._handles)
        self.reset(num_passes)

    @property
    def is_begun(self) -> bool:
        """Whether there are gradients that are not reduced yet, unless their pass raised."""
        return self._pass is None and any(
            s.num_left < self._num_passes and not s.is_done for s in self._slots()
        )

    def take_part_in(self, memory: Memory) -> None:
        """Let a run's memory hold what compression leaves out."""
        if self.compressed is not None:
            group = current().group_of(number_of(self._how.process_set))
            self.compressed.take_part_in(memory, group)

    def reset(self, num_passes: int | None = None) -> None:
        """Begin a new step."""
        self._num_passes = num_passes or self._num_passes
        self._pass = None
        for bucket in self._buckets:
            bucket.abandon()
        for slot in self._slots():
            slot.reset(self._num_passes)
        for bucket in self._buckets:
            bucket.recount()

    def fire(self, param: torch.Tensor) -> None:
        """Take note of a parameter's gradient; its hook calls this."""
        bucket, slot = self._bucket_of[id(param)]
        if slot.is_done:
            if not slot.is_cleared():
                raise AssertionError(_TOO_OFTEN)
            self._reset_cleared()  # the step was skipped, as a GradScaler does
        if slot.num_left <= 0:
            raise AssertionError(_TOO_OFTEN)
        self._begin_pass()
        slot.num_left -= 1
        slot.is_now = True
        if slot.num_left == 0:
            bucket.num_waiting -= 1
            if bucket.num_waiting == 0:
                self._send(bucket, is_final=False)

    def finish(self) -> None:
        """Reduce what is left: after this, all ranks have equal gradients for a step."""
        while waiting := [b for b in self._buckets if b.handle or not b.is_settled()]:
            self._settle(waiting, is_final=True)

    def _begin_pass(self) -> None:
        # By its number: a pass that raised never came to its end.
        number = torch._C._current_graph_task_id()  # noqa: SLF001
        if number != self._pass:
            self._pass = number
            for slot in self._slots():
                slot.is_now = False
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)  # noqa: SLF001

    def _end_pass(self) -> None:
        if any(slot.is_now and slot.num_left <= 0 for slot in self._slots()):
            waiting = [b for b in self._buckets if b.handle or not b.is_settled()]
            self._settle(waiting, is_final=False)
        self._pass = None

    def _settle(self, waiting: Sequence[Bucket], *, is_final: bool) -> None:
        for bucket in waiting:
            if bucket.handle is None:
                self._send(bucket, is_final=is_final)
        begun_s = time.perf_counter()
        for bucket in waiting:
            self._receive(bucket)
        waited(time.perf_counter() - begun_s)

    @torch.no_grad()
    def _send(self, bucket: Bucket, *, is_final: bool) -> None:
        how, context = self._how, current()
        number = number_of(how.process_set)
        group = context.group_of(number)
        ready, sparse, spent = [], [], []
        tensors: list[torch.Tensor] = []
        is_dense = how.sparse_as_dense or self.compressed is not None
        bucket.packed = []
        for i, slot in enumerate(bucket.slots):
            grad = None if slot.is_done else slot.param.grad
            if grad is not None and grad.is_sparse and not is_dense:
                sparse.append(i)
            if grad is not None and (slot.num_left <= 0 or slot.is_now or is_final):
                ready.append(i)
            if not slot.is_sparse:
                packed, ctx = dense(grad, slot.param, is_left_out=i in sparse), None
                if self.compressed is None:
                    packed, ctx = how.compression.compress(packed)
                if packed is grad and i in ready:  # the result takes its place
                    spent.append(len(tensors))
                tensors.append(packed)
                bucket.packed.append((slot, ctx))
        mark = {"ready": ready, "sparse": sparse, "final": is_final}
        if self.compressed is None:
            bucket.sent = AllReduce(
                tensors, how.op, group, scales=how.scales, mark=mark, spent=spent, room=bucket.room
            )
        else:
            bucket.sent = self.compressed.start(bucket.params(), tensors, group, mark)
        name = f"gradients.{self._own_number(context, number)}.{bucket.number}"
        bucket.handle = context.submit(number, "allreduce", name, bucket.sent)
        sending(bucket.sent.num_bytes_sent(), num_reduced_bytes(bucket.num_bytes, group.size()))

    @torch.no_grad()
    def _receive(self, bucket: Bucket) -> None:
        sent, results = bucket.wait()
        marks = [mark for mark in sent.marks if mark is not None]  # None: a rank that has joined
        ready = {i for mark in marks for i in mark["ready"]}
        for i in {i for mark in marks for i in mark["sparse"]}:
            bucket.slots[i].is_sparse = True
        grads = self._unpacked(bucket, sent, results, ready)
        copies: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for i in sorted(ready):
            slot = bucket.slots[i]
            if not slot.is_done:
                self._put(slot, grads.get(id(slot)), copies)
        copy_all(*copies)
        if all(mark["final"] for mark in marks):
            for slot in bucket.slots:
                if not slot.is_done and slot.param.requires_grad:
                    zero(slot)

    def _unpacked(
        self, bucket: Bucket, sent: AllReduce, results: list[torch.Tensor], ready: set[int]
    ) -> dict[int, torch.Tensor]:
        if self.compressed is not None:
            absent = [i for i, s in enumerate(bucket.slots) if s.is_done or i not in ready]
            averages = self.compressed.finish(bucket.params(), results, sent.group, absent)
            factor = sent.group.size() if self._how.op is Op.SUM else 1
            return {id(s): factor * a for s, a in zip(bucket.slots, averages, strict=True)}
        return {
            id(slot): self._how.compression.decompress(result, ctx)
            for result, (slot, ctx) in zip(results, bucket.packed, strict=True)
        }

    def _put(
        self, slot: Slot, grad: torch.Tensor | None,
        copies: tuple[list[torch.Tensor], list[torch.Tensor]],
    ) -> None:  # fmt: skip
        """Store a reduced gradient where the optimizer looks; what is to be copied, note."""
        param = slot.param
        if slot.is_sparse:
            mine = param.grad if param.grad is not None else torch.zeros_like(param)
            mine = mine if mine.is_sparse else mine.to_sparse(1)
            num_bytes = mine._indices().nbytes + mine._values().nbytes  # noqa: SLF001
            group = current().group_of(number_of(self._how.process_set))
            gathered = num_gathered_bytes(num_bytes, group.size())
            sending(gathered, gathered)
            param.grad = sparse_allreduce_async(
                mine, f"gradient.{slot.name}", self._how.op, self._how.process_set
            )()
        elif grad is None:
            msg = f"the gradient of {slot.name} was not sent"
            raise RuntimeError(msg)
        elif param.grad is None:
            param.grad = grad.clone()
        elif param.grad.is_sparse:
            param.grad = grad.to_sparse(1)
        elif param.grad.data_ptr() != grad.data_ptr():
            copies[0].append(param.grad)
            copies[1].append(grad)
        slot.note_done()

    def _reset_cleared(self) -> None:
        for slot in self._slots():
            if not slot.is_done or slot.is_cleared():
                slot.reset(self._num_passes)
        for bucket in self._buckets:
            bucket.recount()

    def _own_number(self, context: Context, process_set: int) -> int:
        """Return what this object is known by to all ranks: the order of first use."""
        if self._number is None or self._number[0] is not context:
            self._number = (context, context.next_user(process_set))
        return self._number[1]

    def _slots(self) -> list[Slot]:
        return [slot for bucket in self._buckets for slot in bucket.slots]


def _fire(this: weakref.ref[Gradients], param: torch.Tensor) -> None:
    gradients = this()
    if gradients is not None:
        gradients.fire(param)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
