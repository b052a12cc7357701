"""Buckets of a `DistributedOptimizer` that travel through dtkit's own compressors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dtkit.compression import WITH_MOMENTUM
from dtkit.compression import Compression as Method
from dtkit.engine.reduce import Wire
from dtkit.engine.reduce.memory import Compressors
from dtkit.engine.reduce.momentum import MomentumCorrection
from dtkit.horovod.movement import split_like
from dtkit.horovod.reduction import AllReduce, Gathered, Op

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.distributed as dist

    from dtkit.engine.reduce.memory import Memory
    from dtkit.horovod.torch.compression import Remembering

__all__ = ["Compressed"]


class Compressed:
    """The compressors of one optimizer's parameters, over one group of ranks.

    Args:
        method: of compression.
        params: all that it will see.
    """

    def __init__(self, method: Remembering, params: Sequence[torch.Tensor]) -> None:
        self.method: Method = method.method
        self._params = list(params)
        self._over: tuple[dist.ProcessGroup, Compressors] | None = None
        self._memory: Memory | None = None
        self.momentum: MomentumCorrection | None = (
            MomentumCorrection() if method.method.name in WITH_MOMENTUM else None
        )
        """Takes the momentum out of the optimizer's step, if the method applies it."""

    def take_part_in(self, memory: Memory, group: dist.ProcessGroup) -> None:
        """Let a run's memory hold what is remembered here."""
        self._memory = memory
        memory.add(self._compressors(group))

    def start(
        self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor],
        group: dist.ProcessGroup, mark: Any,
    ) -> AllReduce:  # fmt: skip
        """Return the collective that carries a bucket's gradients."""
        flat = torch.cat([grad.reshape(-1).to(params[0].dtype) for grad in grads])
        compressor = self._compressors(group).of(params)
        if compressor is None:
            return AllReduce([flat], Op.AVERAGE, group, mark=mark)
        payloads = list(compressor.compress(flat))
        kind = AllReduce if compressor.is_summed else Gathered
        return kind(payloads, Op.SUM, group, mark=mark)

    def finish(
        self, params: Sequence[torch.Tensor], results: Sequence[torch.Tensor],
        group: dist.ProcessGroup, absent: Sequence[int],
    ) -> list[torch.Tensor]:  # fmt: skip
        """Return a bucket's averages; what is `absent` was not sent and is remembered whole."""
        compressor = self._compressors(group).of(params)
        if compressor is None:
            return split_like(results[0], params)
        layout = compressor.layout
        out = torch.empty(layout.num_elements, dtype=layout.dtype, device=layout.device)
        rows = [r.unsqueeze(0) for r in results] if compressor.is_summed else results
        compressor.average(rows, out, absent)
        return split_like(out, params)

    def _compressors(self, group: dist.ProcessGroup) -> Compressors:
        if self._over is None or self._over[0] is not group:  # a new group begins anew
            wire = Wire(group, self.method)
            wire.momentum = self.momentum
            self._over = group, Compressors(wire, self._params)
            if self._memory is not None:
                self._memory.add(self._over[1])
        return self._over[1]
