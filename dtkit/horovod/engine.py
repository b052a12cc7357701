"""What this layer asks of the notebook's engine, if it runs on one."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dtkit.horovod.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from dtkit.engine.agent import Agent

__all__ = ["engine_place", "on_release", "recording_links", "stand_back"]


def _agent() -> Agent | None:
    if "dtkit.engine.agent" not in sys.modules:
        return None
    from dtkit.engine.agent import agent

    try:
        return agent()
    except RuntimeError:  # a process that merely imported it
        return None


def engine_place() -> Place | None:
    """Return this rank's place in the session's group, None outside of an engine."""
    owner = _agent()
    if owner is None or owner.group is None:
        return None
    group = owner.group
    return Place(
        launcher="dtkit", rank=group.rank, size=group.world_size, local_rank=group.local_rank
    )


def recording_links() -> AbstractContextManager[None]:
    """Return a context in which new connections become known to the engine's `release`."""
    owner = _agent()
    if owner is None or owner.group is None:
        return nullcontext()
    return owner.group.links.recording()


def on_release(free: Callable[[], None]) -> None:
    """Call `free` when the engine frees this rank from what it waits for."""
    owner = _agent()
    if owner is not None and owner.group is not None:
        owner.group.on_release.append(free)


def stand_back(params: Sequence[torch.Tensor]) -> None:
    """Let the run that is going on leave these parameters to `hvd.DistributedOptimizer`."""
    owner = _agent()
    if owner is not None and owner.run is not None:
        owner.run.stand_back(params, "hvd.DistributedOptimizer combines its gradients")
