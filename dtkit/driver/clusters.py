"""Which cluster a session gets: engines on this host, or on others; and a look at those alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dtkit.cluster import (
    AttachedCluster,
    AttachedRemoteCluster,
    HostCluster,
    LocalCluster,
    RemoteCluster,
    Wish,
    choose_backend,
    place_local,
)
from dtkit.guard.record import SessionRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.launch import Launch
    from dtkit.values import HostCheck

__all__ = ["PRELOAD", "attached_cluster", "check_hosts", "new_cluster"]

PRELOAD = ("torch", "torch.distributed", "torch.utils.data", "dtkit.engine.run")
"""Loaded by the engines while they start."""
_CHECK_S = 0.5
"""How long each pair of hosts sends at full speed."""


def new_cluster(
    new_record: Callable[[tuple[dict[str, Any], ...], str], SessionRecord],  # Any: JSON
    launch: Launch,
    wish: Wish,
    on_stage: Callable[[str], None],
) -> HostCluster:
    """Start engines where a session wants them.

    Args:
        new_record: makes the session's record from its slots and its backend.
        launch: on which hosts, and through what.
        wish: what the ranks are to have.
        on_stage: called with a short text as each stage begins.

    Raises:
        InvalidInputError: it cannot be done as asked.
        StartError: an engine did not come up.
    """
    if launch.engines == "local":
        slots = place_local(wish.num_ranks, wish.devices, oversubscribe=wish.oversubscribe)
        record = new_record(tuple(map(asdict, slots)), choose_backend(wish.backend, slots))
        return LocalCluster(record, preload=PRELOAD, on_stage=on_stage)
    launch.ranks_by_host(wish.num_ranks)
    record = new_record((), wish.backend)
    return RemoteCluster.started(record, launch, wish, preload=PRELOAD, on_stage=on_stage)


def attached_cluster(record: SessionRecord) -> AttachedCluster:
    """Take over the engines of a session whose kernel is gone.

    Raises:
        InvalidInputError: it has ended meanwhile, or another kernel has it.
        StartError: its controller does not answer.
    """
    is_remote = any(slot.get("host") for slot in record.slots)
    return (AttachedRemoteCluster if is_remote else AttachedCluster)(record.dir, PRELOAD)


def check_hosts(launch: Launch, on_stage: Callable[[str], None]) -> HostCheck:
    """Look whether hosts can train together, and leave nothing on them.

    Args:
        launch: which hosts, and through what they are reached.
        on_stage: called with a short text as each stage begins.

    Raises:
        StartError: a host cannot be reached or used at all.
    """
    record = SessionRecord.new((), "gloo", "", lease_s=0.0, is_strict=True)
    cluster = RemoteCluster(record, launch, on_stage=on_stage)
    try:
        on_stage("measuring how hosts reach each other")
        return cluster.check(_CHECK_S)
    finally:
        cluster.stop()
