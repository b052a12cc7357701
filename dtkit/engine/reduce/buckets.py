"""Buckets: tensors laid end to end, so that one collective carries many gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Bucket", "make_buckets"]

FIRST_BUCKET_BYTES = 1 << 20
"""Small, so that communication starts early in the backward pass."""
BUCKET_BYTES = 25 << 20
"""source: torch DistributedDataParallel's defaults (1 MiB first, 25 MiB after)."""


class Bucket:
    """Gradients of some parameters, averaged over ranks by one collective.

    The last `len(params)` elements say which parameters had a gradient here: a
    parameter that no rank used must keep `grad is None`, because an optimizer
    treats that differently from a zero gradient.

    Args:
        params: same dtype and device; their gradients are averaged.
        tensors: further tensors (running statistics) that are averaged along.
    """

    def __init__(
        self, params: Sequence[torch.nn.Parameter], tensors: Sequence[torch.Tensor] = ()
    ) -> None:
        self.params = tuple(params)
        self.tensors = tuple(tensors)
        members = [*self.params, *self.tensors]
        num_grads = sum(p.numel() for p in self.params)
        num_other = sum(t.numel() for t in self.tensors)
        self.flat = torch.zeros(
            num_grads + num_other + len(self.params),
            dtype=members[0].dtype,
            device=members[0].device,
        )
        self.views: list[torch.Tensor] = []
        offset = 0
        for member in members:
            self.views.append(self.flat[offset : offset + member.numel()].view(member.shape))
            offset += member.numel()
        self._presence = self.flat[offset:]
        self._missing: list[int] = []
        self._work: dist.Work | None = None
        self.num_pending = len(self.params)

    @property
    def num_bytes(self) -> int:
        """Bytes that one rank hands to the collective."""
        return self.flat.numel() * self.flat.element_size()

    def launch(self, group: dist.ProcessGroup) -> None:
        """Copy the gradients in and start summing them over the ranks."""
        self._missing = [i for i, p in enumerate(self.params) if p.grad is None]
        self._presence.fill_(1.0)
        sources = [p.grad for p in self.params if p.grad is not None]
        targets = self.views[: len(self.params)]
        if self._missing:
            targets = [view for i, view in enumerate(targets) if i not in set(self._missing)]
            for i in self._missing:
                self.views[i].zero_()
                self._presence[i] = 0.0
        _copy([*targets, *self.views[len(self.params) :]], [*sources, *self.tensors])
        self._work = dist.all_reduce(self.flat, group=group, async_op=True)

    def finish(self, world_size: int) -> None:
        """Wait for the sums, divide, and put the averages where the gradients are."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.flat.div_(world_size)
        if self._missing:
            self._create_missing()
        pairs = [
            (p.grad, v) for p, v in zip(self.params, self.views, strict=False) if p.grad is not None
        ]
        pairs += zip(self.tensors, self.views[len(self.params) :], strict=True)
        _copy([to for to, _ in pairs], [view for _, view in pairs])

    def abandon(self) -> None:
        """Wait for a collective whose result is stale, and drop it."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _create_missing(self) -> None:
        # Only ranks that lack a gradient look at the flags, so the common case
        # costs no synchronisation with the device.
        for i in self._missing:
            if self._presence[i].item() > 0:
                self.params[i].grad = torch.empty_like(self.params[i])


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if any(s.is_sparse for s in sources):
        sources = [s.to_dense() if s.is_sparse else s for s in sources]
    if targets:
        torch._foreach_copy_(targets, sources)  # noqa: SLF001  torch's own optimizers use it


def make_buckets(
    params: Sequence[torch.nn.Parameter], tensors: Sequence[torch.Tensor] = ()
) -> list[Bucket]:
    """Return buckets in the order in which the backward pass is expected to fill them.

    Args:
        params: in the order of their first use in the forward pass, about.
        tensors: averaged along with the last bucket of their dtype and device.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
    for param in reversed(params):
        kinds.setdefault((param.dtype, param.device), []).append(param)
    extras: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        extras.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    buckets = []
    for kind, members in kinds.items():
        chunks = _chunks(members)
        extra = [extras.pop(kind, [])]
        buckets += [
            Bucket(chunk, more)
            for chunk, more in zip(chunks, [[]] * (len(chunks) - 1) + extra, strict=True)
        ]
    buckets += [Bucket([], more) for more in extras.values()]
    return buckets


def _chunks(params: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    chunks: list[list[torch.nn.Parameter]] = [[]]
    size = 0
    for param in params:
        limit = FIRST_BUCKET_BYTES if len(chunks) == 1 else BUCKET_BYTES
        num_bytes = param.numel() * param.element_size()
        if chunks[-1] and size + num_bytes > limit:
            chunks.append([])
            size = 0
        chunks[-1].append(param)
        size += num_bytes
    return chunks
