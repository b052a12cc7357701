"""Random numbers of the ranks: the same while a cell sets up, different while it trains.

A cell that sets no seed still means one model, one split of its data and one
noise vector. So every rank starts from rank 0's generators. Dropout and
augmentation shall differ, though: once the data is divided, a rank that still
has rank 0's stream takes one of its own.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["fingerprint", "part", "restore", "share", "snapshot"]

# Any, below: the states have the form that each library gives them.


def share(group: dist.ProcessGroup) -> None:
    """Give every rank the generator states of the group's first one."""
    states: list[Any] = [snapshot()]
    dist.broadcast_object_list(states, group=group, group_src=0, device=torch.device("cpu"))
    restore(states[0])


def fingerprint() -> bytes:
    """Return what tells torch's stream on this rank from another."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()


def part(rank: int, first: bytes) -> None:
    """Take a stream of one's own if it is that of the first rank, whose fingerprint is given."""
    if rank and fingerprint() == first:
        torch.manual_seed(torch.initial_seed() + rank)


def snapshot() -> dict[str, Any]:
    """Return the state of all of this rank's generators: plain values and tensors only."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  the one that cells use
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def restore(state: dict[str, Any]) -> None:
    """Set this rank's generators to a snapshot, of this rank or of another."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
