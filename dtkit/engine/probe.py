"""What the link between the ranks carries, and what compressing for it costs; asked while idle."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.compression import Compression
from dtkit.engine.process.agent import agent
from dtkit.engine.reduce import Wire
from dtkit.engine.reduce.compressors import Layout, make_compressor, rehearse
from dtkit.engine.reduce.wire import num_reduced_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["measure"]

_SMALL, _LARGE = 1 << 16, 1 << 20
"""Floats in a message: small at first, for a link on which a large one takes long."""
_LONG_S = 0.1
_NUM = 3


def measure(ranks: Sequence[int], methods: Sequence[str]) -> dict[str, Any]:
    """Return the link's speed and the cost of compression methods; all ranks call it together.

    Returns:
        bytes_per_s: what a rank sends in an all-reduce, per second.
        method_s_per_byte: of each method, seconds of computing for a byte of gradients.
    """
    group, device = dist.group.WORLD, _device()
    if group is None or len(ranks) < group.size():  # the rest would not take part
        return {}
    wire = Wire(group)
    seconds, size = 0.0, 0
    for size in (_SMALL, _LARGE):
        flat = torch.zeros(size, device=device)
        seconds = _median(partial(_all_reduce, wire, flat), _NUM)
        if seconds > _LONG_S:
            break
    sent = num_reduced_bytes(4 * size, group.size())
    return {
        "bytes_per_s": sent / seconds,
        "method_s_per_byte": {name: _cost(name, group.size(), device) for name in methods},
    }


def _all_reduce(wire: Wire, flat: torch.Tensor) -> None:
    # As gradients travel: asynchronously, then waited for.
    work = dist.all_reduce(flat, group=wire.group, async_op=True)
    work.wait()
    _settle(flat.device)


def _cost(name: str, world_size: int, device: torch.device) -> float:
    """Return the seconds that a method takes for a byte of gradients, both ways."""
    layout = Layout((torch.Size([_LARGE]),), torch.float32, device, world_size)
    compressor = make_compressor(Compression.parse(name), layout)
    assert compressor is not None  # noqa: S101  for the type checker: it compresses
    grads, out = torch.randn(_LARGE, device=device), torch.empty(_LARGE, device=device)

    def once() -> None:
        rehearse(compressor, grads, out)
        _settle(device)

    return _median(once, _NUM) / (4 * _LARGE)


def _median(once: Callable[[], None], num: int) -> float:
    once()  # loads what later calls find loaded
    times = []
    for _ in range(num):
        begun_s = time.perf_counter()
        once()
        times.append(time.perf_counter() - begun_s)
    return statistics.median(times)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device() -> torch.device:
    group = agent().group
    if group is None:
        msg = "this rank is in no process group; see %dist_status"
        raise RuntimeError(msg)
    return group.device
