"""Buckets: tensors laid end to end, so that one collective carries many gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dtkit.engine.parallel.norms import own_part
from dtkit.engine.reduce.wire import Averaging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.engine.reduce.compressors import Compressor
    from dtkit.engine.reduce.memory import Compressors
    from dtkit.engine.reduce.wire import Wire

__all__ = ["Bucket", "copy_all", "first_bucket_bytes", "make_buckets"]

FIRST_BUCKET_BYTES = 1 << 20
"""Small, so that communication starts early in the backward pass."""
BUCKET_BYTES = 25 << 20
"""source: torch DistributedDataParallel's defaults (1 MiB first, 25 MiB after)."""
_AT_ONCE_BYTES = 4 << 20
"""Gradients that are no more in all travel as one: the second collective costs more than its
overlap with the rest of the backward pass wins (6 % of a step of 19 ms, 20 % of one of 5 ms)."""
_LARGE_BYTES = 1 << 18
"""More than stays in a core's own cache."""
COMPRESSED_BUCKET_BYTES = 4 << 20
"""Smaller, so that one is compressed while another is under way, and stays in the cache."""


class Bucket:
    """Gradients of some parameters, averaged over ranks by one collective.

    The last `len(params)` elements say which parameters had a gradient here: a
    parameter that no rank used must keep `grad is None`, because an optimizer
    treats that differently from a zero gradient. They travel uncompressed under
    every compressor, and so do running statistics.

    Args:
        params: same dtype and device; their gradients are averaged.
        tensors: further tensors (running statistics) that are averaged along.
        wire: the ranks, and what may make the gradients small on the way.
        compressor: makes them small; only without `tensors`.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        wire: Wire,
        compressor: Compressor | None = None,
    ) -> None:
        self.params: tuple[torch.Tensor, ...] = tuple(params)
        self.tensors: tuple[torch.Tensor, ...] = tuple(tensors)
        self.compressor = compressor
        members = [*map(own_part, self.params), *self.tensors]
        num_values = sum(m.numel() for m in members)
        self.flat: torch.Tensor = torch.zeros(
            num_values + len(self.params), dtype=members[0].dtype, device=members[0].device
        )
        self.views: list[torch.Tensor] = []
        offset = 0
        for member in members:
            self.views.append(self.flat[offset : offset + member.numel()].view(member.shape))
            offset += member.numel()
        self._values, self._presence = self.flat[:offset], self.flat[offset:]
        self._wire = wire
        self._missing: list[int] = []
        self._averaging: Averaging | None = None
        self._waits_for: set[int] = set()
        self._is_stale = False

    @property
    def is_full(self) -> bool:
        """Whether every parameter's gradient has come in this pass."""
        return not self._waits_for and bool(self.params)

    def is_outdated(self) -> bool:
        """Return whether the parameters have moved to another device or dtype since."""
        return any(
            member.device != self.flat.device or member.dtype != self.flat.dtype
            for member in self.params[:1]
        )

    def reset(self) -> None:
        """Begin a new pass."""
        self._waits_for = {id(p) for p in self.params}
        self._is_stale = False

    def filled(self, param: torch.Tensor) -> None:
        """Note that a parameter's gradient has come."""
        # A second time: a reentrant checkpoint adds to a shared gradient twice in
        # a pass. If the bucket has left by then, what it carried is stale.
        self._is_stale |= self._averaging is not None
        self._waits_for.discard(id(param))

    def launch(self) -> None:
        """Copy the gradients in and start averaging them over the ranks."""
        self._wire.on_launch(self)
        with torch.no_grad():
            self._missing = [i for i, p in enumerate(self.params) if p.grad is None]
            self._presence.fill_(1.0)
            for i in self._missing:
                self.views[i].zero_()
                self._presence[i] = 0.0
            present = [i for i, p in enumerate(self.params) if p.grad is not None]
            sources = [_dense(own_part(self.params[i].grad)) for i in present]
            others = self.views[len(self.params) :]
            views = [*(self.views[i] for i in present), *others]
            sources += self.tensors
            is_divided = self.compressor is None
            _copy_divided(views, sources, self._wire.group.size() if is_divided else 1)
            self._averaging = Averaging(
                self._wire, self.flat, self._presence, self.compressor, is_divided=is_divided
            )

    def relaunch_if_stale(self) -> None:
        """Send again if gradients have been added to after the bucket left."""
        if self._is_stale and self._averaging is not None:
            self._averaging.wait()
            self.launch()

    def finish(self) -> None:
        """Wait for the averages, and put them where the gradients are."""
        absent: list[int] = []
        if self._averaging is not None:
            presence = self._averaging.flags()
            # Only ranks that lack a gradient look at the flags, so the common case
            # costs no synchronisation with the device.
            absent = [i for i in self._missing if presence[i].item() == 0]
            self._averaging.finish(self._values, absent)
            self._averaging = None
        for i in self._missing:
            if i not in absent:
                self.params[i].grad = torch.empty_like(self.params[i])
        targets, sources = list(self.tensors), self.views[len(self.params) :]
        for param, view in zip(self.params, self.views, strict=False):
            grad = own_part(param.grad)
            if grad is None:
                continue
            if grad.is_sparse:
                param.grad = view.to_sparse(grad.sparse_dim())
                continue
            # .data: a gradient with a graph of its own (create_graph) must take
            # the average without counting as changed behind autograd's back.
            targets.append(grad.data if grad.requires_grad else grad)
            sources.append(view)
        copy_all(targets, sources)


def _dense(grad: torch.Tensor | None) -> torch.Tensor:
    assert grad is not None  # noqa: S101  for the type checker: the caller looked
    return grad.to_dense() if grad.is_sparse else grad


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, in one call."""
    if targets:
        torch._foreach_copy_(targets, sources)  # torch's own optimizers use it


def _copy_divided(targets: list[torch.Tensor], sources: list[torch.Tensor], parts: int) -> None:
    """Copy and divide; what is large in one go, since memory is what takes the time there."""
    if parts == 1:
        copy_all(targets, sources)
        return
    small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for target, source in zip(targets, sources, strict=True):
        if source.nbytes >= _LARGE_BYTES and source.dtype == target.dtype:
            torch.div(source, parts, out=target)
        else:
            small[0].append(target)
            small[1].append(source)
    if small[0]:
        copy_all(*small)
        torch._foreach_div_(small[0], parts)


def make_buckets(
    params: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    wire: Wire,
    compressors: Compressors,
) -> list[Bucket]:
    """Return buckets in the order in which the backward pass is expected to fill them.

    Args:
        params: in the order of their first use in the forward pass, about.
        tensors: averaged along with the last bucket of their dtype and device, or
            in a bucket of their own if that one is compressed.
        wire: the ranks, and the compression.
        compressors: of the parameters.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for param in reversed(params):
        kinds.setdefault((param.dtype, param.device), []).append(param)
    extras: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        extras.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    buckets = []
    for kind, members in kinds.items():
        is_compressed = wire.compression.name != "none" and kind[0].is_floating_point
        chunks = _chunks(members, COMPRESSED_BUCKET_BYTES if is_compressed else BUCKET_BYTES)
        for chunk in chunks:
            has_extras = chunk is chunks[-1] and not is_compressed
            more = extras.pop(kind, []) if has_extras else []
            buckets.append(Bucket(chunk, more, wire, compressors.of(chunk)))
    return buckets + [Bucket([], more, wire) for more in extras.values()]


def first_bucket_bytes(total_bytes: int) -> int:
    """Return how large the first bucket shall be of gradients that are so much in all."""
    return FIRST_BUCKET_BYTES if total_bytes > _AT_ONCE_BYTES else _AT_ONCE_BYTES


def _chunks(params: list[torch.Tensor], least_bytes: int) -> list[list[torch.Tensor]]:
    """Lay parameters together, in their order, until each chunk is large enough.

    As DDP does: of a large layer behind a small one the gradient leaves when it comes, and
    does not wait for those behind it.
    """
    chunks: list[list[torch.Tensor]] = [[]]
    first_bytes = first_bucket_bytes(sum(own_part(p).nbytes for p in params))
    num_bytes = 0
    for param in params:
        if num_bytes >= (first_bytes if len(chunks) == 1 else least_bytes):
            chunks.append([])
            num_bytes = 0
        chunks[-1].append(param)
        num_bytes += own_part(param).nbytes
    return chunks
