"""The wire: the ranks that average, in what form gradients travel, and how much is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.compression import WITH_MOMENTUM, Compression
from dtkit.engine import weights
from dtkit.engine.models import BY_DDP
from dtkit.engine.parallel.norms import own_part
from dtkit.engine.reduce.compressors import Layout
from dtkit.engine.reduce.memory import Memory
from dtkit.engine.reduce.momentum import MomentumCorrection
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtkit.engine.reduce.buckets import Bucket
    from dtkit.engine.reduce.compressors import Compressor

__all__ = ["Averaging", "Wire", "gather", "num_gathered_bytes", "num_reduced_bytes"]

# torch 2.13 deprecates the old name for the new one.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def gather(*args: Any, **kwargs: Any) -> Any:  # Any: torch's own arguments
    """Call torch's all-gather into one tensor: output, input, group, async_op."""
    # Looked up at each call: a timeline replaces torch's functions while it records.
    return getattr(dist, _GATHER)(*args, **kwargs)


class Wire:
    """What the averaging of one set of gradients needs to know of the ranks.

    Attributes:
        memory: what its compressors remember.
        momentum: takes the momentum out of optimizers whose compressor applies it; whoever
            sees an optimizer made, and its steps, tells it. None: no need.

    Args:
        group: the process group.
        compression: how gradients are made small.
        on_sent: called for each collective with the bytes that this rank sends, and
            with those that it would send without compression.
        strategy: whether gradients are averaged at all, or what is done in place of it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        compression: Compression | None = None,
        on_sent: Callable[[float, float], None] = lambda _sent, _raw: None,
        strategy: Strategy | None = None,
    ) -> None:
        self.group = group
        self.strategy: Strategy = strategy or Strategy()
        self.compression: Compression = compression or Compression()
        self.on_sent = on_sent
        self.memory: Memory = Memory()
        self.on_launch: Callable[[Bucket], None] = lambda _bucket: None
        """Called with each bucket just before its averaging begins: it holds the rank's own."""
        self.before_collective: Callable[[], None] = lambda: None
        """Called before this rank waits for all others, not to average but to agree."""
        self.spread: Callable[[Sequence[torch.Tensor]], bool] = self._broadcast
        """Called with what all ranks shall have as the first one has it; returns whether all do."""
        is_ours = self.compression.name in WITH_MOMENTUM
        self.momentum: MomentumCorrection | None = MomentumCorrection() if is_ours else None

    def over(self, group: dist.ProcessGroup) -> Wire:
        """Return the same over other ranks."""
        other = Wire(group, self.compression, self.on_sent, self.strategy)
        other.momentum, other.memory = self.momentum, self.memory
        return other

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> bool:
        weights.broadcast(tensors, self.group)
        return True

    def not_used_by(self, name: str, reason: str) -> None:
        """Raise if an optimizer's gradients were to be compressed, and travel elsewhere."""
        # In DDP the compressors work as its hook.
        if self.compression.name != "none" and reason != BY_DDP:
            msg = (
                f"--compress {self.compression}: {name} is left alone ({reason}), and what it "
                "sends does not travel through dtkit: leave the flag out"
            )
            raise RuntimeError(msg)

    def method_of(self, optimizer: object) -> str:
        """Return how an optimizer's gradients are compressed: Horovod's knows it itself."""
        return str(getattr(optimizer, "dtkit_compression", self.compression))

    def layout_of(self, params: Sequence[torch.Tensor]) -> Layout:
        """Return the layout of these parameters' gradients: of one dtype, on one device."""
        first = params[0]
        momentum = [] if self.momentum is None else [self.momentum.of(first)]
        shapes = tuple(own_part(p).shape for p in params)
        return Layout(shapes, first.dtype, first.device, self.group.size(), *momentum)


class Averaging:
    """Collectives under way that average `flat` over the ranks: one, or one for each piece.

    Args:
        wire: the ranks.
        flat: what is averaged; its last elements may be flags.
        flags: these; ones and zeros. Afterwards one that was 1 on any rank is not 0.
        compressor: makes what comes before the flags small; None: all is sent as it is.
        is_divided: whether it was divided by the number of ranks already, all but the flags.
    """

    def __init__(
        self,
        wire: Wire,
        flat: torch.Tensor,
        flags: torch.Tensor,
        compressor: Compressor | None = None,
        *,
        is_divided: bool = False,
    ) -> None:
        self._wire = wire
        self._num_flags = flags.numel()
        self._compressor = compressor
        self._received: list[torch.Tensor] = []
        self._works: list[dist.Work] = []
        self._leaving: list[torch.Tensor] = []
        world_size = wire.group.size()
        raw_bytes = num_reduced_bytes(_num_bytes(flat), world_size)
        if compressor is None:
            # Before the sum, as DDP does: half precision may not hold the sum.
            self._reduce(flat if is_divided else flat.div_(world_size))
            wire.on_sent(raw_bytes, raw_bytes)
            return
        num_bytes = 0
        for payload in compressor.compress(flat[: flat.numel() - self._num_flags]):
            is_first = not self._works
            piece = torch.cat([payload, flags.to(payload.dtype)]) if is_first else payload
            num_bytes += _num_bytes(piece)
            (self._reduce if compressor.is_summed else self._gather)(piece)
        count = num_reduced_bytes if compressor.is_summed else num_gathered_bytes
        wire.on_sent(count(num_bytes, world_size), raw_bytes)

    def future(self) -> torch.futures.Future[Any]:
        """Return torch's future of the collectives."""
        futures = [work.get_future() for work in self._works]
        return futures[0] if len(futures) == 1 else torch.futures.collect_all(futures)

    def wait(self) -> None:
        """Wait until all of it has arrived."""
        for work in self._works:
            work.wait()

    def flags(self) -> torch.Tensor:
        """Wait for the flags, which come first, and return them."""
        self._works[0].wait()
        first = self._received[0]
        return first[:, first.shape[1] - self._num_flags :].sum(0)

    def finish(
        self, out: torch.Tensor, absent: Sequence[int] = (), *, has_arrived: bool = False
    ) -> None:
        """Write the averages to `out`; see `Compressor.average`.

        Args:
            out: the numbers without the flags.
            absent: parameters for which no rank had a gradient.
            has_arrived: whether to wait for nothing: a callback of `future` must not.
        """
        if self._compressor is not None:
            self._compressor.average(self._arriving(has_arrived=has_arrived), out, absent)
        elif not has_arrived:
            self.wait()

    def _arriving(self, *, has_arrived: bool) -> Iterator[torch.Tensor]:
        """Yield the pieces, each once it is there: it is read while the next ones arrive."""
        num_flags = self._num_flags
        for work, received in zip(self._works, self._received, strict=True):
            if not has_arrived:
                work.wait()
            yield received[:, : received.shape[1] - num_flags]
            num_flags = 0

    def _reduce(self, tensor: torch.Tensor) -> None:
        self._works.append(dist.all_reduce(tensor, group=self._wire.group, async_op=True))
        self._received.append(tensor.unsqueeze(0))

    def _gather(self, tensor: torch.Tensor) -> None:
        group = self._wire.group
        received = tensor.new_empty((group.size(), tensor.numel()))
        self._works.append(gather(received.view(-1), tensor, group=group, async_op=True))
        self._received.append(received)
        self._leaving.append(tensor)  # kept until it has left


def num_reduced_bytes(num_bytes: float, world_size: int) -> float:
    """Return what a rank sends in a ring all-reduce: each part goes round nearly twice."""
    return 2 * (world_size - 1) / world_size * num_bytes


def num_gathered_bytes(num_bytes: float, world_size: int) -> float:
    """Return what a rank sends in a ring all-gather: what every rank gives but its neighbour."""
    return (world_size - 1) * num_bytes


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
