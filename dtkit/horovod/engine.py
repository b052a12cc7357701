"""What this layer asks of the notebook's engine, and what it tells the run that goes on."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError
from dtkit.horovod.arrival import arriving, leave
from dtkit.horovod.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from dtkit.engine.process.agent import Agent, Averaged
    from dtkit.horovod.patience import Patience

__all__ = [
    "engine_place",
    "on_release",
    "recording_links",
    "report_to",
    "say_goodbye",
    "sending",
    "stand_back",
    "waited",
    "waiting_for_all",
]


class _Script:
    """In a process that is no engine."""

    run: Averaged | None = None


def report_to(run: Averaged | None) -> None:
    """Let a script's run be told of what happens here; None: no longer."""
    _Script.run = run


def _run() -> Averaged | None:
    owner = _agent()
    return _Script.run if owner is None else owner.run


def _agent() -> Agent | None:
    if "dtkit.engine.process.agent" not in sys.modules:
        return None
    from dtkit.engine.process.agent import agent

    try:
        return agent()
    except RuntimeError:  # a process that merely imported it
        return None


def engine_place() -> Place | None:
    """Return this rank's place in the session's group, None outside of an engine.

    Raises:
        InvalidInputError: the run that is going on leaves ranks out.
    """
    owner = _agent()
    if owner is None or owner.group is None:
        return None
    group = owner.group
    if owner.run is not None and len(owner.run.ranks) < group.world_size:
        named = ",".join(map(str, owner.run.ranks))
        msg = (
            f"hvd.init() under --ranks {named}: Horovod's job is all {group.world_size} ranks, "
            f"and the others never come. Leave --ranks out, and name these ranks as a process "
            f"set: hvd.add_process_set([{named}])"
        )
        raise InvalidInputError(msg)
    return Place(
        launcher="dtkit", rank=group.rank, size=group.world_size, local_rank=group.local_rank
    )


def waiting_for_all(patience: Patience) -> AbstractContextManager[None]:
    """Return a context that begins once all ranks of the session have come to it."""
    owner = _agent()
    if owner is None or owner.group is None:
        return nullcontext()  # what the launcher started has met already
    group = owner.group
    return arriving(group.store, group.rank, group.world_size, patience)


def say_goodbye() -> None:
    """Let others wait again for this rank to come."""
    owner = _agent()
    if owner is not None and owner.group is not None:
        leave(owner.group.store, owner.group.rank)


def recording_links() -> AbstractContextManager[None]:
    """Return a context in which new connections become known to the engine's `release`."""
    owner = _agent()
    if owner is None or owner.group is None:
        return nullcontext()
    return owner.group.links.recording()


def on_release(free: Callable[[], None]) -> Callable[[], None]:
    """Call `free` when the engine frees this rank from what it waits for.

    Returns:
        What ends that. Until then the engine holds all that `free` refers to.
    """
    owner = _agent()
    if owner is None or owner.group is None:
        return lambda: None
    waiting = owner.group.on_release
    waiting.append(free)
    return lambda: waiting.remove(free)


def stand_back(params: Sequence[torch.Tensor]) -> None:
    """Let the run that is going on leave these parameters to `hvd.DistributedOptimizer`."""
    run = _run()
    if run is not None:
        run.stand_back(params, "hvd.DistributedOptimizer combines its gradients")


def sending(sent_bytes: float, raw_bytes: float) -> None:
    """Tell the run that is going on what this rank sends, and would send uncompressed."""
    run = _run()
    if run is not None:
        run.sent(sent_bytes, raw_bytes)


def waited(seconds: float) -> None:
    """Tell the run that is going on that this rank has waited so long for others, until now."""
    run = _run()
    if run is not None:
        run.waited(seconds)
