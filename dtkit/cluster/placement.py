"""Which rank runs where: the one place that maps ranks to engines and devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError, check_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BACKENDS", "Slot", "choose_backend", "gpu_indices", "place_local"]

BACKENDS = ("auto", "gloo", "nccl")
MAX_DEFAULT_CPU_RANKS = 4
MAX_RANKS = 1024
"""On one host: a number beyond is a slip of the finger, and would fill the memory."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One rank's place.

    Attributes:
        rank: global rank in the process group, 0 to world_size - 1.
        engine: id of the ipyparallel engine that the rank lives on.
        local_rank: index among the ranks of the same host.
        gpu: physical index of the rank's GPU on its host, None for the CPU.
        num_threads: intra-op threads the rank may use.
        shares_gpu: whether another rank uses the same GPU.
        host: as the user calls it; empty for the host of the driver.
        agent: number of the agent that starts the engine there.
    """

    rank: int
    engine: int
    local_rank: int
    gpu: str | None
    num_threads: int
    shares_gpu: bool = False
    host: str = ""
    agent: int = 0

    @property
    def device(self) -> str:
        """What the rank itself calls its device: it sees only its own GPU."""
        return "cpu" if self.gpu is None else "cuda:0"


def gpu_indices() -> list[str]:
    """Return this host's GPUs as CUDA names them, without loading CUDA.

    `CUDA_VISIBLE_DEVICES` is honoured; else the driver's own list of its devices is read.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        nodes = list(Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return []
    return [str(i) for i in range(len(nodes))]


def place_local(
    num_ranks: int | None,
    devices: str | None,
    *,
    oversubscribe: bool = False,
    gpus: list[str] | None = None,
    num_cores: int | None = None,
) -> tuple[Slot, ...]:
    """Return one slot per rank on this host.

    Args:
        num_ranks: how many ranks; None means one per device (CPU: the cores, at most 4).
        devices: `cpu`, or GPU indices such as `0,1`; None means every GPU, the CPU without one.
        oversubscribe: let several ranks share a GPU.
        gpus: the host's GPUs; None asks the machine.
        num_cores: CPU cores to divide among the ranks; None asks the machine.

    Raises:
        InvalidInputError: the devices do not exist, or are fewer than the ranks.
    """
    gpus = gpu_indices() if gpus is None else gpus
    num_cores = num_cores or len(os.sched_getaffinity(0))
    chosen = _choose_devices(devices, gpus)
    if num_ranks is None:
        num_ranks = len(chosen) or min(num_cores, MAX_DEFAULT_CPU_RANKS)
    if not 1 <= num_ranks <= MAX_RANKS:
        msg = f"-n {num_ranks}: one host takes 1 to {MAX_RANKS} ranks, for example -n 2"
        raise InvalidInputError(msg)
    if chosen and num_ranks > len(chosen) and not oversubscribe:
        msg = (
            f"-n {num_ranks}: there are only {len(chosen)} GPUs ({', '.join(chosen)}); use -n "
            f"{len(chosen)}, or add --oversubscribe so that ranks share a GPU (over gloo, slower)"
        )
        raise InvalidInputError(msg)
    num_threads = max(1, num_cores // num_ranks)
    return tuple(
        Slot(
            rank=i,
            engine=i,
            local_rank=i,
            gpu=chosen[i % len(chosen)] if chosen else None,
            num_threads=num_threads,
            shares_gpu=num_ranks > len(chosen) > 0,
        )
        for i in range(num_ranks)
    )


def _choose_devices(devices: str | None, gpus: list[str]) -> list[str]:
    if devices is None:
        return gpus
    if devices == "cpu":
        return []
    chosen = [name.strip() for name in devices.split(",")]
    unknown = [name for name in chosen if name not in gpus]
    if unknown:
        there = f"GPUs {', '.join(gpus)}" if gpus else "no GPU here"
        msg = (
            f"--devices {devices}: no GPU {', '.join(unknown)}; there is {there}, or --devices cpu"
        )
        raise InvalidInputError(msg)
    if len(set(chosen)) < len(chosen):
        msg = (
            f"--devices {devices}: a GPU is named twice; "
            "for ranks that share one use --oversubscribe"
        )
        raise InvalidInputError(msg)
    return chosen


def choose_backend(backend: str, slots: Sequence[Slot]) -> str:
    """Return gloo or nccl for these slots; `auto` takes nccl where each rank has its own GPU.

    Raises:
        InvalidInputError: there is no such backend, or not for these slots.
    """
    check_choice("--backend", backend, BACKENDS)
    has_own_gpu = all(slot.gpu is not None and not slot.shares_gpu for slot in slots)
    if backend == "nccl" and not has_own_gpu:
        msg = (
            "--backend nccl needs a GPU for each rank; use --backend gloo, or -n with at most "
            "as many ranks as there are GPUs"
        )
        raise InvalidInputError(msg)
    if backend == "auto":
        return "nccl" if has_own_gpu else "gloo"
    return backend
