"""GradSynchronizer: gradients of a set of parameters are averaged inside `backward()`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from dtkit.engine.reduce.buckets import Bucket, make_buckets
from dtkit.engine.reduce.memory import Compressors
from dtkit.engine.reduce.passes import Passes
from dtkit.engine.reduce.sparse import average_sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from dtkit.engine.reduce.wire import Wire

__all__ = ["GradSynchronizer"]


class GradSynchronizer:
    """Averages `p.grad` of some parameters over the ranks of a group.

    Each parameter's hook reports its gradient; a bucket is sent as soon as all
    of its gradients are there, while the backward pass goes on; what is left is
    sent and everything is waited for when the pass ends. So the gradients are
    final when `backward()` returns, and clipping or a GradScaler need no change.

    In which pass it communicates is up to `Passes`. Every rank must run the
    same passes and steps in the same order; which parameters get gradients may
    differ.

    Args:
        params: the parameters, about in order of use; all of them require gradients.
        wire: the process group, and how gradients are compressed.
        passes: shared by the synchronizers of one program; None: one of its own,
            which notices passes by their first gradient.
        sparse: those of the parameters whose gradients are sparse; they travel alone.
        tensors: returns float tensors averaged along with the gradients (running
            statistics); asked again when the model moves to another device.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        wire: Wire,
        passes: Passes | None = None,
        *,
        sparse: Sequence[torch.Tensor] = (),
        tensors: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> None:
        self.params: tuple[torch.Tensor, ...] = tuple(params)
        self.wire = wire
        self.due = 0
        self._passes = passes or Passes()
        self.number: int = self._passes.next_number()
        self._sparse = tuple(sparse)
        self._tensors = tensors
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._last_step = self._passes.num_begun
        self._last_reduced = -1  # gradients may be older than this object
        self._compressors = Compressors(wire, self.params)
        self._handles: dict[int, Any] = {}  # RemovableHandle
        self._hook_all()
        weakref.finalize(self, _remove, self._handles)
        self._passes.schedule(self, self._passes.num_begun + 1)

    @property
    def is_dirty(self) -> bool:
        """Whether there was a backward pass since the gradients were last averaged."""
        return self._last_reduced < self._passes.num_begun

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing left to average."""
        return not self.params and self._tensors is tuple

    def flush(self) -> None:
        """Average now whatever `backward()` left unaveraged."""
        self._passes.flush([self])

    def stepped(self) -> None:
        """Note that the gradients were used: learn how many passes that took."""
        now = self._passes.num_begun
        if now > self._last_step:  # else another optimizer of the same parameters came first
            self._passes.schedule(self, now + now - self._last_step)
            self._last_step = now

    def drop(self, params: Iterable[torch.Tensor]) -> None:
        """Leave these parameters to somebody else."""
        params = list(params)
        gone = {id(p) for p in params}
        had_params = bool(self.params)
        _remove({k: self._handles.pop(k) for k in gone.intersection(self._handles)})
        self.params = tuple(p for p in self.params if id(p) not in gone)
        self._sparse = tuple(p for p in self._sparse if id(p) not in gone)
        if had_params and not self.params:
            self._tensors = tuple
        self.forget_buckets()
        self._compressors.drop(params)

    def close(self) -> None:
        """Remove every hook; the parameters are as they were found."""
        self.drop(self.params)

    def prepare(self) -> list[Bucket]:
        """Return the buckets, ready for a pass."""
        # Late, and again if the model was moved: the optimizer may be older than
        # `model.to(device)`, which keeps the parameters and changes their storage.
        if not self._buckets or any(bucket.is_outdated() for bucket in self._buckets):
            alone = {id(p) for p in self._sparse}
            # .data: writing an average must not look to autograd like a change to
            # a tensor that a graph has saved.
            self._buckets = make_buckets(
                [p for p in self.params if id(p) not in alone],
                [t.data for t in self._tensors()],
                self.wire,
                self._compressors,
            )
            self._bucket_of = {id(p): b for b in self._buckets for p in b.params}
        for bucket in self._buckets:
            bucket.reset()
        return self._buckets

    def finish(self) -> None:
        """Wait until the gradients are averages."""
        for bucket in self._buckets:
            bucket.finish()
        for param in self._sparse:
            average_sparse(param, self.wire)
        self._last_reduced = self._passes.num_begun

    def forget_buckets(self) -> None:
        """Lay out the buckets anew before the next pass; those under way are ignored."""
        self._buckets = []
        self._bucket_of = {}

    def received(self, param: torch.Tensor) -> None:
        """Take note of a parameter's gradient; its hook calls this."""
        if not self._passes.is_open:
            self._passes.begin_in_engine()
        if self.due == self._passes.num_begun:
            bucket = self._bucket_of.get(id(param))  # None: sparse
            if bucket is not None:
                bucket.filled(param)
                self._passes.advance()

    def _hook_all(self) -> None:
        # Weakly: a parameter must not keep alive what keeps the parameter alive,
        # or a model's memory would wait for the garbage collector.
        this = weakref.ref(self)

        def fired(param: torch.Tensor) -> None:
            synchronizer = this()
            if synchronizer is not None:
                synchronizer.received(param)

        for param in self.params:
            self._handles[id(param)] = param.register_post_accumulate_grad_hook(fired)


def _remove(handles: dict[int, Any]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
