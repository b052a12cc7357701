"""The wire: the ranks that average, in what form gradients travel, and how much is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.compression import Compression
from dtkit.engine import weights
from dtkit.engine.models import BY_DDP
from dtkit.engine.parallel.norms import own_part
from dtkit.engine.reduce.compressors import Layout
from dtkit.engine.reduce.memory import Memory
from dtkit.engine.reduce.momentum import MomentumCorrection
from dtkit.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
        self.strategy = strategy or Strategy()
        self.compression = compression or Compression()
        self.on_sent = on_sent
        self.memory = Memory()
        self.on_launch: Callable[[Bucket], None] = _ignore
        """Called with each bucket just before its averaging begins: it holds the rank's own."""
        self.before_collective: Callable[[], None] = _do_nothing
        """Called before this rank waits for all others, not to average but to agree."""
        self.spread: Callable[[Sequence[torch.Tensor]], bool] = self._broadcast
        """Called with what all ranks shall have as the first one has it; returns whether all do."""
        self.momentum = MomentumCorrection() if self.compression.name == "topk" else None

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

    def layout_of(self, params: Sequence[torch.Tensor]) -> Layout:
        """Return the layout of these parameters' gradients: of one dtype, on one device."""
        first = params[0]
        momentum = [] if self.momentum is None else [self.momentum.of(first)]
        shapes = tuple(own_part(p).shape for p in params)
        return Layout(shapes, first.dtype, first.device, self.group.size(), *momentum)


class Averaging:
    """One collective under way that averages `flat` over the ranks.

    Args:
        wire: the ranks.
        flat: what is averaged; its last elements may be flags.
        flags: these; ones and zeros. Afterwards one that was 1 on any rank is not 0.
        compressor: makes what comes before the flags small; None: all is sent as it is.
    """

    def __init__(
        self,
        wire: Wire,
        flat: torch.Tensor,
        flags: torch.Tensor,
        compressor: Compressor | None = None,
    ) -> None:
        group = wire.group
        self._num_flags = flags.numel()
        self._compressor = compressor
        world_size = group.size()
        raw_bytes = num_reduced_bytes(_num_bytes(flat), world_size)
        if compressor is None:
            # Before the sum, as DDP does: half precision may not hold the sum.
            flat.div_(world_size)
            self._received = flat.unsqueeze(0)
            sent_bytes = raw_bytes
            self._work = dist.all_reduce(flat, group=group, async_op=True)
            wire.on_sent(sent_bytes, raw_bytes)
            return
        payload = compressor.compress(flat[: flat.numel() - self._num_flags])
        sent = torch.cat([payload, flags.to(payload.dtype)])
        if compressor.is_summed:
            self._received = sent.unsqueeze(0)
            sent_bytes = num_reduced_bytes(_num_bytes(sent), world_size)
            self._work = dist.all_reduce(sent, group=group, async_op=True)
        else:
            self._received = sent.new_empty((world_size, sent.numel()))
            sent_bytes = num_gathered_bytes(_num_bytes(sent), world_size)
            self._work = gather(self._received.view(-1), sent, group=group, async_op=True)
        self._sent = sent  # until it has left
        wire.on_sent(sent_bytes, raw_bytes)

    def future(self) -> torch.futures.Future[Any]:
        """Return torch's future of the collective."""
        future: torch.futures.Future[Any] = self._work.get_future()
        return future

    def wait(self) -> torch.Tensor:
        """Wait until it is done; returns the flags."""
        self._work.wait()
        num_values = self._received.shape[1] - self._num_flags
        return self._received[:, num_values:].sum(0)

    def finish(self, out: torch.Tensor, absent: Sequence[int] = ()) -> None:
        """Write the averages to `out`; see `Compressor.average`."""
        if self._compressor is not None:
            num_values = self._received.shape[1] - self._num_flags
            self._compressor.average(self._received[:, :num_values], out, absent)


def num_reduced_bytes(num_bytes: float, world_size: int) -> float:
    """Return what a rank sends in a ring all-reduce: each part goes round nearly twice."""
    return 2 * (world_size - 1) / world_size * num_bytes


def num_gathered_bytes(num_bytes: float, world_size: int) -> float:
    """Return what a rank sends in a ring all-gather: what every rank gives but its neighbour."""
    return (world_size - 1) * num_bytes


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _do_nothing() -> None:
    return None


def _ignore(_bucket: Bucket) -> None:
    return None
