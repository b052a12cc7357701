"""Where the processes of a job find each other, and the process group they make."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dtkit.errors import InvalidInputError
from dtkit.horovod.errors import HorovodInternalError
from dtkit.horovod.place import seconds_of

if TYPE_CHECKING:
    from dtkit.horovod.place import Place

__all__ = ["make_group", "start_timeout_s"]

_POLL_S = 0.05
_COLLECTIVE_TIMEOUT_S = 24 * 3600
"""A step may rightly take hours; who is missing is found by the negotiation."""


class _Meeting:
    """The store of this process's job: kept, since a job may shut down and start again."""

    store: dist.Store | None = None
    job: str | None = None
    num_groups = 0


def start_timeout_s() -> float:
    """Return how long the processes wait for each other: HOROVOD_START_TIMEOUT, in seconds."""
    return seconds_of(os.environ, "HOROVOD_START_TIMEOUT", 60.0)


def make_group(place: Place) -> None:
    """Make torch's default process group of all processes of the job.

    Raises:
        InvalidInputError: the launcher does not say where to meet.
        HorovodInternalError: not all of them came in time.
    """
    if _Meeting.store is None or _Meeting.job != place.job:
        _Meeting.store, _Meeting.job, _Meeting.num_groups = _store(place), place.job, 0
    _Meeting.num_groups += 1  # a prefix that served a group before may hang the next
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"dtkit-hvd/{attempt}/{_Meeting.num_groups}", _Meeting.store)
    device = _device(place)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device is not None else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
        )
    except (RuntimeError, ValueError) as error:
        msg = (
            f"rank {place.rank} of {place.size}, started by {place.launcher}, could not meet the "
            f"others: {error}"
        )
        raise HorovodInternalError(msg) from error


def _device(place: Place) -> int | None:
    """Return the GPU of this rank; None if there are fewer than ranks on the host."""
    if not torch.cuda.is_available() or place.local_rank is None:
        return None
    local_size = place.local_size or place.local_rank + 1
    return place.local_rank if local_size <= torch.cuda.device_count() else None


def _store(place: Place) -> dist.Store:
    if place.size == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=start_timeout_s())
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        # torchrun's agent may hold the store itself.
        is_master = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), place.size,
            is_master=is_master, timeout=timeout, wait_for_workers=False,
        )  # fmt: skip
    if place.job is None or _spans_hosts(place):
        msg = (
            f"{place.launcher} started {place.size} ranks and does not say where they meet: set "
            "MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, for all ranks "
            "(mpirun: -x MASTER_ADDR=… -x MASTER_PORT=…)"
        )
        raise InvalidInputError(msg)
    return _store_on_this_host(place)


def _spans_hosts(place: Place) -> bool:
    num_nodes = int(os.environ.get("SLURM_NNODES", "1")) if place.launcher == "srun" else 1
    return num_nodes > 1 or (place.local_size or place.size) < place.size


def _store_on_this_host(place: Place) -> dist.Store:
    """Return the store that rank 0 opens on a port of the system's choice.

    The others read the port from a file of the user's own, named after the job.
    """
    folder = Path(tempfile.gettempdir()) / f"dtkit-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        msg = f"{folder} belongs to another user; set TMPDIR to a folder of your own"
        raise InvalidInputError(msg)
    path = folder / f"job-{hashlib.sha256(str(place.job).encode()).hexdigest()[:16]}"
    timeout = timedelta(seconds=start_timeout_s())
    if place.rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        store = dist.TCPStore(
            "127.0.0.1", port, place.size, is_master=True, wait_for_workers=False,
            timeout=timeout, master_listen_fd=listener.detach(),
        )  # fmt: skip
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(str(port))
        new.replace(path)
        _wait_for_all(store, place.size)
        path.unlink(missing_ok=True)
        return store
    store = _found(path, place, timeout)
    store.add("dtkit-here", 1)
    return store


def _wait_for_all(store: dist.TCPStore, size: int) -> None:
    """Wait until the others have read the file; who does not come is missed by the group."""
    deadline = time.monotonic() + start_timeout_s()
    while store.add("dtkit-here", 0) < size - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _found(path: Path, place: Place, timeout: timedelta) -> dist.TCPStore:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        # A file that a job of the same name left behind: nobody listens there.
        with contextlib.suppress(OSError, ValueError):
            port = int(path.read_text())
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return dist.TCPStore("127.0.0.1", port, place.size, timeout=timeout)
        time.sleep(_POLL_S)
    msg = (
        f"rank {place.rank} waited {timeout.total_seconds():.0f} s for rank 0; did it fail to "
        "start? HOROVOD_START_TIMEOUT sets the seconds"
    )
    raise HorovodInternalError(msg)
