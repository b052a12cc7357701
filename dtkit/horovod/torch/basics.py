"""Lifecycle, topology, and what this installation can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dtkit.horovod import context, sets

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]


def init(
    comm: Sequence[int] | None = None,
    process_sets: Iterable[sets.ProcessSet] | str | None = None,
) -> None:
    """Join the job; every rank calls it. Harmless when that was done.

    Args:
        comm: all ranks, or None. For some of the ranks use process sets.
        process_sets: to be added at once; `"dynamic"` stands for none.

    Raises:
        HorovodInternalError: the others did not come.
    """
    context.open_context()
    if comm is not None and list(comm) != list(range(size())):
        msg = f"hvd.init(comm={list(comm)}): for some of the ranks use hvd.add_process_set"
        raise ValueError(msg)
    sets.open_sets(process_sets)


def shutdown() -> None:
    """Leave the job; `init` joins it again."""
    context.close()


def is_initialized() -> bool:
    """Return whether `init` was called."""
    return context.is_open()


def rank() -> int:
    """Return this process's number among all."""
    return context.current().topology.rank


def size() -> int:
    """Return the number of processes."""
    return context.current().topology.size


def local_rank() -> int:
    """Return this process's number on its host: its device's, where each has one."""
    return context.current().topology.local_rank


def local_size() -> int:
    """Return the number of processes on this host."""
    return context.current().topology.local_size


def cross_rank() -> int:
    """Return this host's number among those with a process of the same local rank."""
    return context.current().topology.cross_rank


def cross_size() -> int:
    """Return the number of hosts that have a process of this local rank."""
    return context.current().topology.cross_size


def is_homogeneous() -> bool:
    """Return whether all hosts have as many processes."""
    return context.current().topology.is_homogeneous


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Begin to write a timeline; every rank calls it, and rank 0 writes.

    In Horovod this needs HOROVOD_TIMELINE=DYNAMIC; here it is always possible.

    Args:
        file_path: for Chrome's tracing page and Perfetto.
        mark_cycles: whether each time that ranks are heard is marked.
    """
    context.current().start_timeline(file_path, mark_cycles=mark_cycles)


def stop_timeline() -> None:
    """End the timeline; the file is complete."""
    context.current().stop_timeline()


def mpi_threads_supported() -> bool:
    """Return False: nothing goes over MPI, also under mpirun."""
    context.current()
    return False


def mpi_enabled() -> bool:
    """Return False: nothing goes over MPI."""
    return False


def mpi_built() -> bool:
    """Return False: nothing goes over MPI."""
    return False


def gloo_enabled() -> bool:
    """Return whether torch has gloo."""
    return gloo_built()


def gloo_built() -> bool:
    """Return whether torch has gloo."""
    return dist.is_gloo_available()


def nccl_built() -> int:
    """Return the version of torch's NCCL as one number, such as 22005; 0 without it."""
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        return 0
    major, minor, patch = torch.cuda.nccl.version()[:3]
    return int(major) * 10_000 + int(minor) * 100 + int(patch)


def ddl_built() -> bool:
    """Return False."""
    return False


def ccl_built() -> bool:
    """Return False."""
    return False


def cuda_built() -> bool:
    """Return whether torch was built with CUDA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Return whether torch was built with ROCm."""
    return torch.version.hip is not None
