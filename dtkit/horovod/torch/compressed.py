"""Buckets of a `DistributedOptimizer` that travel through dtkit's own compressors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.engine.reduce import Wire
from dtkit.engine.reduce.memory import Compressors
from dtkit.engine.reduce.momentum import MomentumCorrection
from dtkit.horovod.movement import split_like
from dtkit.horovod.reduction import AllReduce, Gathered, Op

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.distributed as dist

    from dtkit.horovod.torch.compression import Remembering

__all__ = ["Compressed"]


class Compressed:
    """The compressors of one optimizer's parameters, over one group of ranks.

    Args:
        method: of compression.
        params: all that it will see.
    """

    def __init__(self, method: Remembering, params: Sequence[torch.Tensor]) -> None:
        self._method = method
        self._params = list(params)
        self._over: tuple[dist.ProcessGroup, Compressors] | None = None
        self.momentum = MomentumCorrection() if method.method.name == "topk" else None
        """Takes the momentum out of the optimizer's step, if the method applies it."""

    def start(
        self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor],
        group: dist.ProcessGroup, mark: Any,
    ) -> AllReduce:  # fmt: skip
        """Return the collective that carries a bucket's gradients."""
        flat = torch.cat([grad.reshape(-1).to(params[0].dtype) for grad in grads])
        compressor = self._compressors(group).of(params)
        if compressor is None:
            return AllReduce([flat], Op.AVERAGE, group, mark=mark)
        payload = compressor.compress(flat)
        kind = AllReduce if compressor.is_summed else Gathered
        return kind([payload], Op.SUM, group, mark=mark)

    def finish(
        self, params: Sequence[torch.Tensor], result: torch.Tensor, group: dist.ProcessGroup,
        absent: Sequence[int],
    ) -> list[torch.Tensor]:  # fmt: skip
        """Return a bucket's averages; what is `absent` was not sent and is remembered whole."""
        compressor = self._compressors(group).of(params)
        if compressor is None:
            return split_like(result, params)
        out = result.new_empty(compressor.layout.num_elements, dtype=compressor.layout.dtype)
        compressor.average(result if result.dim() > 1 else result.unsqueeze(0), out, absent)
        return split_like(out, params)

    def _compressors(self, group: dist.ProcessGroup) -> Compressors:
        if self._over is None or self._over[0] is not group:  # a new group begins anew
            wire = Wire(group, self._method.method)
            wire.momentum = self.momentum
            self._over = group, Compressors(wire, self._params)
        return self._over[1]
