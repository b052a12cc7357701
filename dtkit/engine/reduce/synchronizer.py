"""GradSynchronizer: gradients of a set of parameters are averaged inside `backward()`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.engine.reduce.buckets import Bucket, make_buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["GradSynchronizer"]


class GradSynchronizer:
    """Averages `p.grad` of some parameters over the ranks of a group.

    Each parameter's hook reports its gradient; a bucket is sent as soon as all
    of its gradients are there, while the backward pass goes on; what is left is
    sent and everything is waited for when the pass ends. So the gradients are
    final when `backward()` returns, and clipping or a GradScaler need no change.

    Averaging is linear and leaves an average as it is. Hence what is right for
    one backward pass per step is right for several, whichever of them
    communicate, as long as one does after the last. That is used twice: at
    first every pass communicates; then, once a step has shown how many passes
    it takes, only the last one does; and `flush`, called before the step, makes
    up for a guess that was too high.

    Every rank must run the same passes in the same order, as with DDP.

    Args:
        params: the parameters, about in order of use; frozen ones may be among them.
        group: the process group.
        sparse: those of the parameters whose gradients are sparse; they travel alone.
        tensors: returns float tensors averaged along with the gradients (running
            statistics); asked again when the model moves to another device.
        on_wait: called with the seconds that a pass had to wait for other ranks.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        group: dist.ProcessGroup,
        *,
        sparse: Sequence[torch.nn.Parameter] = (),
        tensors: Callable[[], Sequence[torch.Tensor]] = tuple,
        on_wait: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self.params = tuple(params)
        self._group = group
        self._world_size = dist.get_world_size(group)
        self._sparse = tuple(sparse)
        self._tensors = tensors
        self._on_wait = on_wait
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._fired: set[int] = set()
        self._refill: set[int] = set()
        self._next_bucket = 0
        self._in_pass = False
        self._is_reducing = False
        self._num_passes = 0
        self._expected_passes = 1
        self.is_dirty = False
        """Whether gradients were added since they were last averaged."""
        self._handles: list[Any] = []  # RemovableHandle
        for param in self.params:
            self._hook(param)

    def flush(self) -> None:
        """Average now whatever `backward()` left unaveraged."""
        if self.is_dirty:
            self._prepare()
            self._finish_pass()

    def stepped(self) -> None:
        """Note that the optimizer used the gradients: learn how many passes a step takes."""
        if self._num_passes:
            self._expected_passes = self._num_passes
        self._num_passes = 0

    def zeroed(self) -> None:
        """Note that the gradients were cleared: passes are counted anew."""
        self._num_passes = 0
        self.is_dirty = False

    def close(self) -> None:
        """Remove every hook; the parameters are as they were found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buckets.clear()
        self._bucket_of.clear()

    def _hook(self, param: torch.nn.Parameter) -> None:
        # A frozen parameter takes no hook; if it is unfrozen later its owner
        # makes a synchronizer for it then.
        if param.requires_grad:
            handle = param.register_post_accumulate_grad_hook(self._on_grad)
            self._handles.append(handle)

    def _on_grad(self, param: torch.Tensor) -> None:
        if not self._in_pass:
            self._begin_pass()
        if not self._is_reducing:
            return
        key = id(param)
        bucket = self._bucket_of.get(key)
        if bucket is None:  # sparse
            return
        if key in self._fired:
            # A reentrant checkpoint adds to the same gradient twice in a pass. If
            # the bucket has left, what it carried is stale.
            self._refill.add(id(bucket))
            return
        self._fired.add(key)
        bucket.num_pending -= 1
        if not bucket.num_pending:
            self._launch_full()

    def _begin_pass(self) -> None:
        self._in_pass = True
        self.is_dirty = True
        self._num_passes += 1
        self._is_reducing = self._num_passes >= self._expected_passes
        if self._is_reducing:
            self._prepare()
        torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)  # noqa: SLF001

    def _prepare(self) -> None:
        # Late, and again if the model was moved: the optimizer may be older than
        # `model.to(device)`, which keeps the parameters and changes their storage.
        if not self._buckets or self._is_outdated():
            alone = {id(p) for p in self._sparse}
            active = [p for p in self.params if p.requires_grad and id(p) not in alone]
            # .data: writing an average must not look to autograd like a change to
            # a tensor that a graph has saved.
            self._buckets = make_buckets(active, [t.data for t in self._tensors()])
            self._bucket_of = {id(p): b for b in self._buckets for p in b.params}
        for bucket in self._buckets:
            bucket.num_pending = len(bucket.params)
        self._fired.clear()
        self._refill.clear()
        self._next_bucket = 0

    def _is_outdated(self) -> bool:
        return any(
            b.params[0].device != b.flat.device or b.params[0].dtype != b.flat.dtype
            for b in self._buckets
            if b.params
        )

    def _launch_full(self) -> None:
        # In order, whatever order they fill up in: ranks must agree on it.
        while self._next_bucket < len(self._buckets):
            bucket = self._buckets[self._next_bucket]
            if bucket.num_pending or not bucket.params:
                return
            bucket.launch(self._group)
            self._next_bucket += 1

    def _end_pass(self) -> None:
        self._in_pass = False
        if self._is_reducing:
            self._is_reducing = False
            self._finish_pass()

    @torch.no_grad()
    def _finish_pass(self) -> None:
        start = time.perf_counter()
        launched = self._buckets[: self._next_bucket]
        for bucket in self._buckets[self._next_bucket :]:
            bucket.launch(self._group)
        for bucket in launched:
            if id(bucket) in self._refill:
                bucket.abandon()
                bucket.launch(self._group)
        for bucket in self._buckets:
            bucket.finish(self._world_size)
        for param in self._sparse:
            self._average_sparse(param)
        self._next_bucket = 0
        self.is_dirty = False
        self._on_wait(time.perf_counter() - start)

    def _average_sparse(self, param: torch.nn.Parameter) -> None:
        if param.grad is None:
            param.grad = torch.zeros_like(param, layout=torch.sparse_coo)
        total = param.grad.coalesce()
        dist.all_reduce(total, group=self._group)
        param.grad = total / self._world_size
