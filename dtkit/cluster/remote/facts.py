"""What a host says of itself before it gets engines."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Self

from dtkit.cluster.placement import gpu_indices

__all__ = ["HostFacts"]

_PACKAGES = ("dtkit", "ipyparallel", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """One host.

    Attributes:
        host: what it calls itself.
        interface: through which it reaches the others.
        address: its own, there.
        gpus: as CUDA names them.
        num_cores: that a process of this user may use.
        versions: of Python and of what has to be equal everywhere, by name.
        code: a checksum of dtkit's files: two checkouts can have one version.
        shared_memory_bytes: what /dev/shm holds.
        unix_s: its clock.
        has_folder: whether the notebook's folder is there.
        folder: where the session keeps its files on this host.
    """

    host: str
    interface: str
    address: str
    gpus: tuple[str, ...]
    num_cores: int
    versions: dict[str, str]
    code: str
    shared_memory_bytes: int
    unix_s: float
    has_folder: bool
    folder: str

    @classmethod
    def of_this_host(cls, interface: str, address: str, *, folder: str, has_folder: bool) -> Self:
        """Return the facts of this host; imports no torch."""
        return cls(
            # Slurm's own name for a node: several can share a host name.
            host=os.environ.get("SLURMD_NODENAME") or platform.node(),
            interface=interface,
            address=address,
            gpus=tuple(gpu_indices()),
            num_cores=len(os.sched_getaffinity(0)),
            versions=_versions(),
            code=_checksum(),
            shared_memory_bytes=shutil.disk_usage("/dev/shm").total,  # noqa: S108  asked, not used
            unix_s=time.time(),
            has_folder=has_folder,
            folder=folder,
        )

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return what `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the facts that another host has sent."""
        return cls(**{**values, "gpus": tuple(values["gpus"])})


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    for distribution in distributions():
        name = str(distribution.metadata["Name"])
        if name.startswith("nvidia-nccl"):
            found["NCCL"] = distribution.version
    return found


def _checksum() -> str:
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
