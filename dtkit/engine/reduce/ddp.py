"""The compressors in DistributedDataParallel, as its communication hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtkit.engine.reduce.compressors import make_compressor
from dtkit.engine.reduce.wire import Averaging

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from dtkit.engine.reduce.compressors import Compressor
    from dtkit.engine.reduce.wire import Wire

__all__ = ["compress_ddp"]


def compress_ddp(model: DistributedDataParallel, wire: Wire) -> None:
    """Let DDP send its gradients compressed, for as long as it lives.

    Args:
        model: no communication hook may be registered with it yet.
        wire: its process group, and the compression.
    """
    model.register_comm_hook(_Buckets(wire), _average)


class _Buckets:
    """The compressors of DDP's buckets, which it lays out anew after its first pass."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._compressors: dict[tuple[int, ...], Compressor | None] = {}
        self._memory: dict[int, dict[str, Any]] = {}

    def compressor(self, params: list[torch.Tensor]) -> Compressor | None:
        """Return the compressor of the bucket that holds these parameters."""
        key = tuple(map(id, params))
        if key not in self._compressors:
            self._forget_others(set(key))
            made = make_compressor(self.wire.compression, self.wire.layout_of(params))
            if made is not None and self._memory:
                made.load([self._memory.pop(i, {}) for i in key])
            self._compressors[key] = made
        return self._compressors[key]

    def _forget_others(self, params: set[int]) -> None:
        for key in [key for key in self._compressors if params.intersection(key)]:
            old = self._compressors.pop(key)
            if old is not None:
                self._memory.update(zip(key, old.state(), strict=True))


def _average(buckets: _Buckets, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    flat: torch.Tensor = bucket.buffer()
    compressor = buckets.compressor(bucket.parameters())
    averaging = Averaging(buckets.wire, flat, flat[:0], compressor)

    def done(_future: Any) -> torch.Tensor:
        averaging.finish(flat)
        return flat

    # On a thread of the backend's: it may compute there, but not communicate.
    return averaging.future().then(done)


# torch compares annotations with its own types, and ours are strings.
_average.__annotations__.clear()
