"""How far a rank's monotonic clock is from the first rank's."""

from __future__ import annotations

import hashlib
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Offset", "measure_offset"]

_NUM_ROUNDS = 30


class Offset(NamedTuple):
    """What to add to this rank's clock to get the first rank's.

    Attributes:
        offset_ns: that.
        error_ns: how far off it may be.
        has_hosts: whether the ranks are on several hosts, so that clocks can drift apart.
    """

    offset_ns: int = 0
    error_ns: int = 0
    has_hosts: bool = False


def measure_offset(rank: int, ranks: Sequence[int], *, is_forced: bool = False) -> Offset:
    """Return how far this rank's clock is from the first rank's.

    All of `ranks` must call it, and nothing else meanwhile. Processes of one host
    share the clock: there is nothing to measure. Else the first rank answers pings:
    its answer came at the middle of the round trip, give or take half of it; the
    shortest of the round trips counts.

    Args:
        rank: this rank.
        ranks: of the run.
        is_forced: measure also on one host.
    """
    first, *others = ranks
    mine = _host_number()
    if rank == first:
        has_hosts = False
        for other in others:
            is_far = _receive(other) != mine or is_forced
            has_hosts |= is_far
            _send(int(is_far), other)
            for _ in range(_NUM_ROUNDS if is_far else 0):
                _receive(other)
                _send(time.perf_counter_ns(), other)
        for other in others:
            _send(int(has_hosts), other)
        return Offset(has_hosts=has_hosts)
    _send(mine, first)
    best = (0, 0)
    for i in range(_NUM_ROUNDS if _receive(first) else 0):
        start_ns = time.perf_counter_ns()
        _send(0, first)
        there_ns = _receive(first)
        end_ns = time.perf_counter_ns()
        error_ns = (end_ns - start_ns + 1) // 2
        if i == 0 or error_ns < best[1]:
            best = (there_ns - (start_ns + end_ns) // 2, error_ns)
    return Offset(*best, has_hosts=bool(_receive(first)))


def _host_number() -> int:
    """Return a number that is this boot of this host's own."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = platform.node()
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _send(value: int, rank: int) -> None:
    dist.send(torch.tensor([value], dtype=torch.int64), rank)


def _receive(rank: int) -> int:
    value = torch.zeros(1, dtype=torch.int64)
    dist.recv(value, rank)
    return int(value.item())
