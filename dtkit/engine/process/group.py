"""The process group of this rank: join, leave, and free a rank that waits in a collective."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import platform
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

# Before there is a group: its functions have the one that exists then as their default, for ever.
import torch.distributed.nn.functional
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from dtkit.engine import replicas
from dtkit.engine.living import alive, note
from dtkit.engine.patches import replaced
from dtkit.engine.process import completion, memory, progressbars, status, where
from dtkit.engine.process.agent import agent, install
from dtkit.engine.process.links import Links
from dtkit.engine.process.shell import current_shell
from dtkit.horovod import alias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.engine.process.agent import Agent

__all__ = [
    "Group",
    "generation_of",
    "join",
    "leave",
    "open_store",
    "own_address",
    "release",
    "subgroup",
]

COLLECTIVE_TIMEOUT_S = 24 * 3600
"""Ranks are freed by `release`, not by a time-out: a step may rightly take hours."""
_JOIN_TIMEOUT_S = 60


@dataclass(slots=True)
class Group:
    """This rank's place in the process group, and the means to leave it by force."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    backend: str
    generation: int
    store: dist.TCPStore
    links: Links
    host: str
    """What tables call it: as the user does, or the launcher; several nodes can share a name."""
    on_release: list[Callable[[], None]] = field(default_factory=list)
    """Called by `release`: whoever lets this rank wait for others outside of collectives."""
    patches: ExitStack = field(default_factory=ExitStack)
    """What is in place in torch while the group exists."""
    subgroups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    """Of runs on some of the ranks: one for each set of them, as long as the group exists."""


def open_store(world_size: int) -> tuple[str, int]:
    """Open the store of a new group on this rank and return its address and port.

    It listens on this rank's own address only, which is loopback where all ranks are on one
    host: `TCPStore` by itself listens on every interface.
    """
    install()
    listener = socket.create_server((own_address(), 0))
    address, port = listener.getsockname()
    agent().group_store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_JOIN_TIMEOUT_S),
        master_listen_fd=listener.detach(),
    )
    return address, port


def own_address() -> str:
    """Return the address at which the other ranks reach this one."""
    return os.environ.get("DTKIT_ADDRESS", "127.0.0.1")


def join(spec: dict[str, Any]) -> dict[str, Any]:
    """Join the group and put its names into the namespace; return facts about this rank.

    Args:
        spec: rank, local_rank, world_size, device, backend, generation, num_threads,
            is_debug, host: as the user calls it, and address and port: where rank 0's store
            listens.
    """
    install()
    alias.install()
    progressbars.install()
    for kind in (nn.Module, DistributedDataParallel, DeviceMesh):
        note(kind)
    rank, world_size = int(spec["rank"]), int(spec["world_size"])
    owner = agent()
    store = owner.group_store if rank == 0 else None
    if store is None:
        timeout = timedelta(seconds=_JOIN_TIMEOUT_S)
        store = dist.TCPStore(spec["address"], spec["port"], world_size, timeout=timeout)
    device = torch.device(spec["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(int(spec["num_threads"]))
    # It wraps the group in one that compares what the ranks are about to do.
    is_debug = bool(spec.get("is_debug"))
    dist.set_debug_level(dist.DebugLevel.DETAIL if is_debug else dist.DebugLevel.OFF)
    links = Links(int(spec["port"]))
    with links.recording():
        dist.init_process_group(
            _backends(spec["backend"]),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device if spec["backend"] == "nccl" else None,
        )
        # The first collective opens connections that were not needed to be a group.
        has_models = torch.tensor(float(bool(owner.retired)), device=device)
        dist.all_reduce(has_models)
    owner.group = Group(
        rank, int(spec["local_rank"]), world_size, device, spec["backend"],
        int(spec["generation"]), store, links, str(spec["host"]) or platform.node(),
    )  # fmt: skip
    owner.group.patches.enter_context(links.recording_groups())
    replicas.attach(owner.detached)
    owner.detached = []
    if has_models == world_size:  # a new engine has none
        from dtkit.engine.parallel.revival import revive

        revive(owner.retired)
    owner.retired = []
    _name_everything(owner.group)
    status.install(owner)
    completion.install(owner)
    where.install(owner)
    facts = _facts(owner.group)
    owner.on("about", lambda _request: {"facts": facts, "generation": generation_of(owner)})
    return facts


def subgroup(group: Group, ranks: Sequence[int], name: str) -> dist.ProcessGroup | None:
    """Return the process group of these ranks; None if it is one. A collective among them.

    Args:
        group: of all ranks.
        ranks: of it, in order.
        name: the same on all of them, and used for one group of these ranks only.
    """
    if len(ranks) == 1:
        return None
    found = group.subgroups.get(tuple(ranks), dist.group.WORLD)
    if len(ranks) < group.world_size and found is dist.group.WORLD:
        # torch names it after how many groups this process has made, and hangs where ranks
        # have made different ones: an earlier run on some of them, or a cell's own.
        text = hashlib.sha256(f"{name} {list(ranks)}".encode()).hexdigest()
        with replaced(c10d, "_hash_ranks_to_str", lambda _torch: lambda _ranks: text):
            found = dist.new_group(list(ranks), use_local_synchronization=True)
        group.subgroups[tuple(ranks)] = found
    if found is None:
        msg = "the process group is gone; see %dist_reset"
        raise RuntimeError(msg)
    return found


def generation_of(owner: Agent) -> int:
    """Return which of the session's groups this rank is in; 0: in none."""
    return 0 if owner.group is None else owner.group.generation


def leave() -> None:
    """Destroy the group; harmless when there is none."""
    owner = agent()
    group, owner.group = owner.group, None
    if group is None:
        return
    group.patches.close()
    group.subgroups.clear()
    # A thread of the cell's that waits in a collective would wait for ever: all are leaving.
    group.links.cut()
    group.links.close()
    # The last failed cell's frames hold it otherwise, with its threads and connections.
    memory.forget_last_error(getattr(sys, "last_value", None))
    if "torch.distributed.fsdp" in sys.modules:  # loading it takes a second
        from dtkit.engine.parallel.retirement import retire

        owner.retired += retire()
    has_models = bool(alive(DistributedDataParallel) or alive(DeviceMesh))
    owner.detached += replicas.detach()
    _destroy(has_models=has_models, has_reducers=bool(owner.detached))
    owner.group_store = None


def _destroy(*, has_models: bool, has_reducers: bool) -> None:
    """Destroy all groups, with what holds them, so that no connection of theirs ends later.

    Args:
        has_models: whether there are models that hold a group, maybe where Python does not see it.
        has_reducers: whether models were just taken out of it.
    """
    groups: list[Any] = list(c10d._world.pg_map)  # noqa: SLF001  no public way
    if has_reducers:  # they end here, while their group is there
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    if not has_models:
        left = [ref(group) for group in groups]
        groups.clear()
        groups = [group for each in left if (group := each()) is not None]
    # A DDP object that outlives its group deadlocks in its destructor unless the
    # group is still referenced then: collect first, drop the group after.
    if groups:  # a collection takes 60 to 120 ms, while the user waits for an error
        gc.collect()


def release(group: Group, *, is_hard: bool = False) -> int:
    """Make every collective that this rank waits in fail now; return how many links were cut.

    The group is of no use afterwards: `leave` and `join` again.
    """
    if group.backend == "nccl":
        dist.distributed_c10d._abort_process_group()  # noqa: SLF001  no public abort
    num_cut = group.links.cut(is_hard=is_hard)
    for free in [*group.on_release]:
        free()
    return num_cut


def _backends(backend: str) -> str:
    # Objects and CPU tensors travel over gloo beside NCCL.
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"


def _name_everything(group: Group) -> None:
    """Give the cells `rank`, `device` and so on; a user's own variable is left alone."""
    shell = current_shell()
    given = shell.user_ns.setdefault("_dtkit_given", {})
    names = {
        "rank": group.rank,
        "local_rank": group.local_rank,
        "world_size": group.world_size,
        "device": group.device,
        "dist": dist,
    }
    for name, value in names.items():
        if name not in shell.user_ns or shell.user_ns[name] is given.get(name):
            shell.user_ns[name] = given[name] = value
    shell.user_ns_hidden.update(given, _dtkit_given=given)


def _facts(group: Group) -> dict[str, Any]:
    is_cuda = group.device.type == "cuda"
    return {
        "rank": group.rank,
        "pid": os.getpid(),
        "host": group.host,
        "device": str(group.device),
        "device_name": torch.cuda.get_device_name(group.device) if is_cuda else _cpu_name(),
        "torch": str(torch.__version__),  # a class of torch's own, which the driver would load
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"
