"""Place: what a launcher's environment says of this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALONE", "Place", "place_of", "seconds_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process among those that were launched together.

    Attributes:
        launcher: who says so; shown in messages.
        rank: among all.
        size: how many there are.
        local_rank: among those of its host, as the launcher counts them; None
            if it does not say. It never follows from `rank`: Open MPI 5 gives
            rank 1 local rank 2.
        local_size: how many are on its host, if the launcher says.
        node: what tells its host from others, if the launcher says.
        job: what all of them know and no other job does; a meeting place is
            named after it where the launcher has none.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None
    node: str | None = None
    job: str | None = None


@dataclass(frozen=True, slots=True)
class _Launcher:
    """The names of one launcher's variables; an empty name: it has none."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    node: str = ""
    job: tuple[str, ...] = ()


# In this order: horovodrun and torchrun may themselves run under mpirun or srun.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    _Launcher(
        "horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK",
        "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK", job=("HOROVOD_JOB_ID",),
    ),
    _Launcher(
        "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
              job=("PMI_JOBID", "HYDI_CONTROL_FD")),
    _Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", node="SLURM_NODEID",
              job=("SLURM_JOB_ID", "SLURM_STEP_ID")),
)  # fmt: skip

ALONE = Place(launcher="none", rank=0, size=1, local_rank=0, local_size=1, node="0", job="alone")


def place_of(environment: Mapping[str, str]) -> Place:
    """Return this process's place; `ALONE` without a launcher.

    Raises:
        InvalidInputError: a launcher's variables are there in part, or are no numbers.
    """
    for launcher in _LAUNCHERS:
        if launcher.rank in environment and launcher.size in environment:
            return _read(launcher, environment)
    return ALONE


def seconds_of(environment: Mapping[str, str], name: str, otherwise: float) -> float:
    """Return what a variable of Horovod's says.

    Raises:
        InvalidInputError: it is no number.
    """
    text = environment.get(name)
    try:
        return otherwise if text is None else float(text)
    except ValueError:
        msg = f"{name}={text!r} is no number of seconds"
        raise InvalidInputError(msg) from None


def _read(launcher: _Launcher, environment: Mapping[str, str]) -> Place:
    def number(name: str) -> int | None:
        text = environment.get(name)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            msg = f"{name}={text!r}, set by {launcher.name}, is not a number"
            raise InvalidInputError(msg) from None

    rank, size = number(launcher.rank) or 0, number(launcher.size) or 1
    if not 0 <= rank < size:
        msg = f"{launcher.rank}={rank} is no rank of {launcher.size}={size}; is one of them stale?"
        raise InvalidInputError(msg)
    parts = [environment[name] for name in launcher.job if name in environment]
    return Place(
        launcher=launcher.name,
        rank=rank,
        size=size,
        local_rank=number(launcher.local_rank),
        local_size=number(launcher.local_size),
        node=environment.get(launcher.node),
        job="-".join(parts) or None,
    )
