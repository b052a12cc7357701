"""Context: this process's place in the job, its groups and its end of the negotiation."""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import socket
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtkit.horovod import world
from dtkit.horovod.controller import Controller, Handle
from dtkit.horovod.coordinator import Coordinator
from dtkit.horovod.engine import (
    engine_place,
    on_release,
    recording_links,
    say_goodbye,
    waiting_for_all,
)
from dtkit.horovod.errors import HorovodInternalError
from dtkit.horovod.movement import Nothing
from dtkit.horovod.negotiation import GLOBAL_SET
from dtkit.horovod.patience import Patience
from dtkit.horovod.place import Place, place_of, seconds_of
from dtkit.horovod.reduction import added, zeros_for
from dtkit.horovod.rendezvous import make_group
from dtkit.horovod.timeline import Timeline, file_of_environment
from dtkit.horovod.topology import Topology, topology_of
from dtkit.horovod.wire import MAX_PAYLOAD_BYTES, RemoteChannel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.horovod.controller import Collective
    from dtkit.horovod.wire import Channel, Message

__all__ = ["Context", "close", "current", "is_open", "open_context"]

_EAGER_BYTES_BETWEEN_HOSTS = 1 << 16
"""Rank 0's link carries all ranks' payloads, where every link of gloo's ring carries as much."""
_NOT_INITIALIZED = "Horovod has not been initialized: call hvd.init() first"


@dataclass(slots=True)
class Context:
    """What `hvd.init` makes and `hvd.shutdown` ends."""

    topology: Topology
    world: Any  # torch's default group, to notice that it was rebuilt
    is_group_ours: bool
    device: torch.device
    groups: dict[int, dist.ProcessGroup]
    members: dict[int, tuple[int, ...]]
    controller: Controller
    coordinator: Coordinator | None
    counters: dict[tuple[int, str], Iterator[int]] = field(default_factory=dict)
    pid: int = field(default_factory=os.getpid)
    _users: dict[int, Iterator[int]] = field(default_factory=dict)
    unhook: Callable[[], None] = lambda: None
    """Ends that the engine frees what waits here."""

    def submit(self, process_set: int, kind: str, name: str | None, made: Collective) -> Handle:
        """Submit a collective; one without a name is numbered, by kind and process set."""
        if name is None:
            count = self.counters.setdefault((process_set, kind), itertools.count(1))
            name = f"noname.{next(count)}"
        return self.controller.submit(process_set, f"{kind}.{name}", made)

    def next_user(self, process_set: int) -> int:
        """Return a number for something that names its own tensors, such as an optimizer."""
        return next(self._users.setdefault(process_set, itertools.count(1)))

    def agree(self, process_set: int, name: str, made: Nothing) -> Message:
        """Wait until all ranks of a process set have said the same; returns the answer."""
        answer: Message = self.controller.submit(process_set, name, made).wait()
        return answer

    def group_of(self, process_set: int) -> dist.ProcessGroup:
        """Return a process set's group.

        Raises:
            ValueError: this rank is not in it, or it was removed.
        """
        group = self.groups.get(process_set)
        if group is None:
            state = "does not include this rank" if process_set in self.members else "is not there"
            msg = f"process set {process_set} {state}"
            raise ValueError(msg)
        return group

    def start_timeline(self, path: str, *, mark_cycles: bool) -> None:
        """Begin a timeline, on rank 0; one that is being written ends."""
        self.stop_timeline()
        if self.coordinator is not None:
            timeline = Timeline(path, mark_cycles=mark_cycles)
            self.coordinator.timeline = timeline
            self.controller.finished = timeline.finished

    def stop_timeline(self) -> None:
        """End the timeline."""
        timeline = None if self.coordinator is None else self.coordinator.timeline
        if self.coordinator is not None and timeline is not None:
            self.coordinator.timeline = None
            timeline.close()

    def add_group(self, process_set: int, ranks: tuple[int, ...]) -> None:
        """Make a process set's group; all ranks of the job call this in the same order."""
        if process_set in self.members:
            return
        with recording_links():
            group = dist.new_group(list(ranks))
            if self.topology.rank in ranks:
                self.groups[process_set] = group
                # The first collective opens the connections.
                dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        self.members[process_set] = ranks

    def drop_group(self, process_set: int) -> None:
        """Forget a process set."""
        del self.members[process_set]
        group = self.groups.pop(process_set, None)
        if group is not None:
            dist.destroy_process_group(group)


class _Open:
    """The context of this process, of which there is one as in Horovod itself."""

    context: Context | None = None


def current() -> Context:
    """Return the context.

    Raises:
        ValueError: `hvd.init` was not called.
        HorovodInternalError: the group was rebuilt since.
    """
    context = _Open.context
    if context is None:
        raise ValueError(_NOT_INITIALIZED)
    if context.world is not dist.group.WORLD:
        msg = "the process group was rebuilt since hvd.init(): call hvd.init() again"
        raise HorovodInternalError(msg)
    return context


def is_open() -> bool:
    """Return whether `hvd.init` was called, the group is still the same, and nothing failed."""
    context = _Open.context
    return (
        context is not None
        and context.world is dist.group.WORLD
        and not context.controller.is_broken
    )


def open_context() -> None:
    """Join the job, or the group that is there already; harmless when it was done."""
    if is_open():
        return
    close()  # its group is gone, or the ranks were no longer at the same place
    is_ours = not dist.is_initialized()
    place = engine_place() or (world.place() if world.is_elastic() else place_of(os.environ))
    if is_ours:
        make_group(place)
    place = Place(
        launcher=place.launcher, rank=dist.get_rank(), size=dist.get_world_size(),
        local_rank=place.local_rank, local_size=place.local_size, node=place.node, job=place.job,
    )  # fmt: skip
    with waiting_for_all(_patience()):
        context = _Open.context = _join(place, is_ours=is_ours)
    named = file_of_environment()
    if named is not None:
        context.start_timeline(named[0], mark_cycles=named[1])
    context.unhook = on_release(partial(context.controller.fail, "this rank was released"))
    atexit.register(close)


def _join(place: Place, *, is_ours: bool) -> Context:
    topology, hosts = topology_of(place)
    device = _device(topology)
    with recording_links():
        group = dist.new_group()
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    coordinator, address, token = _coordinate(topology, hosts)
    everyone = tuple(range(topology.size))
    channel: Channel
    if coordinator is not None:
        channel = coordinator.own_channel()
    else:
        channel = RemoteChannel(address, topology.rank, token)
    is_one_host = len(set(hosts)) == 1
    eager_bytes = MAX_PAYLOAD_BYTES if is_one_host else _EAGER_BYTES_BETWEEN_HOSTS
    controller = Controller(channel, _stand_in, eager_bytes)
    return Context(
        topology, dist.group.WORLD, is_ours, device, {GLOBAL_SET: group},
        {GLOBAL_SET: everyone}, controller, coordinator,
    )  # fmt: skip


def close() -> None:
    """Leave the job; harmless when it was left."""
    context = _Open.context
    if context is None or context.pid != os.getpid():  # a forked child, at its exit
        return
    _leave(context)
    if context.coordinator is not None:
        context.coordinator.wait()
    if context.world is not dist.group.WORLD:
        return
    say_goodbye()
    if context.is_group_ours:
        dist.destroy_process_group()
    else:
        for group in context.groups.values():
            dist.destroy_process_group(group)


def _stand_in(answer: Message) -> Collective:
    """Return what this rank contributes after it has joined: zeros."""
    if answer["meta"]["kind"] == "barrier":
        return Nothing("barrier")
    context = current()
    return zeros_for(answer, context.groups[answer["set"]], context.device)


def _leave(context: Context) -> None:
    _Open.context = None
    atexit.unregister(close)
    context.unhook()
    context.stop_timeline()
    context.controller.close()


def _device(topology: Topology) -> torch.device:
    if "nccl" in dist.get_backend_config():
        torch.cuda.set_device(topology.local_rank)
        return torch.device("cuda", topology.local_rank)
    return torch.device("cpu")


def _coordinate(
    topology: Topology, hosts: list[str]
) -> tuple[Coordinator | None, tuple[str, int], str]:
    """Start the coordinator on rank 0, and tell everyone where it listens."""
    found: list[Any] = [None]
    coordinator = None
    if topology.rank == 0:
        host = "127.0.0.1"
        if len(set(hosts)) > 1:
            host = os.environ.get("DTKIT_ADDRESS") or os.environ.get("MASTER_ADDR", "")
            host = host or socket.gethostbyname(socket.gethostname())
        listener = socket.create_server((host, 0), backlog=topology.size)
        token = secrets.token_hex(16)
        coordinator = Coordinator(listener, topology.size, token, _patience(), added)
        found = [(listener.getsockname()[:2], token)]
    dist.broadcast_object_list(found, src=0)
    (host, port), token = found[0]
    return coordinator, (host, port), token


def _patience() -> Patience:
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("", "0"):
        return Patience(warning_s=0.0)
    return Patience(
        warning_s=seconds_of(os.environ, "HOROVOD_STALL_CHECK_TIME_SECONDS", 60.0),
        shutdown_s=seconds_of(os.environ, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0.0),
    )
