"""Launch: through what engines are started, and on which hosts; as the user asked for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from dtkit.errors import InvalidInputError, check_choice

__all__ = ["ENGINES", "LOCAL", "HostRequest", "Launch", "parse_hosts"]

ENGINES = ("local", "ssh", "mpi", "slurm", "profile")
_FOR = {
    "hosts": ("ssh", "mpi"),
    "profile": ("profile",),
    "interface": ("ssh", "mpi", "slurm", "profile"),
    "python": ("ssh", "mpi", "slurm", "profile"),
    "ssh": ("ssh",),
    "mpi": ("mpi",),
    "nodes": ("slurm", "profile"),
    "partition": ("slurm",),
    "account": ("slurm",),
    "gpus_per_node": ("slurm",),
    "time": ("slurm",),
    "sbatch": ("slurm",),
}
"""Options, and for which engines they say something."""


@dataclass(frozen=True, slots=True)
class HostRequest:
    """One host as the user wrote it.

    Attributes:
        name: as ssh or mpirun knows it.
        num_ranks: how many ranks it takes; None: one per GPU, or per core up to 4 without one.
    """

    name: str
    num_ranks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Where engines are started, and through what.

    Attributes:
        engines: local, ssh, mpi, slurm or profile.
        profile: of ipyparallel, whose engine launcher starts the agents.
        hosts: for ssh and mpi, each with its number of ranks; ranks are numbered in their order.
        interface: through which hosts reach each other; empty: the one that leads to them.
        python: the interpreter on the hosts; empty: at the same path as this one.
        ssh: further options for ssh and scp, such as `-F FILE`.
        mpi: further options for mpirun.
        nodes: how many nodes the job takes; 0: one.
        partition: of Slurm.
        account: of Slurm.
        gpus_per_node: of the Slurm job.
        time: limit of the Slurm job, as sbatch takes it.
        sbatch: further options for sbatch.

    Raises:
        InvalidInputError: an option is missing, or says nothing for such engines.
    """

    engines: str = "local"
    hosts: tuple[HostRequest, ...] = ()
    profile: str = ""
    interface: str = ""
    python: str = ""
    ssh: str = ""
    mpi: str = ""
    nodes: int = 0
    partition: str = ""
    account: str = ""
    gpus_per_node: str = ""
    time: str = ""
    sbatch: str = ""

    def __post_init__(self) -> None:
        check_choice("--engines", self.engines, ENGINES)
        if self.engines == "ssh" and not self.hosts:
            msg = "--engines ssh needs --hosts, for example --hosts alpha:4,beta:4"
            raise InvalidInputError(msg)
        if self.engines == "profile" and not self.profile:
            msg = "--engines profile needs --profile NAME, a profile of ipyparallel's"
            raise InvalidInputError(msg)
        for field in fields(self)[1:]:
            if getattr(self, field.name) and self.engines not in _FOR[field.name]:
                option = "--" + field.name.replace("_", "-")
                wanted = " or ".join(f"--engines {engines}" for engines in _FOR[field.name])
                msg = f"{option} says nothing for engines that are {self.engines}: add {wanted}"
                raise InvalidInputError(msg)
        for option in ("ssh", "mpi", "sbatch"):
            self.words(option)

    def words(self, option: str) -> list[str]:
        """Return the further options for a program as words.

        Raises:
            InvalidInputError: a quote is not closed.
        """
        text = str(getattr(self, option))
        try:
            return shlex.split(text)
        except ValueError as error:
            msg = f"--{option} {text!r}: {error}"
            raise InvalidInputError(msg) from None

    def ranks_by_host(self, num_ranks: int | None) -> list[int | None]:
        """Return how many ranks each host takes; None: as many as it has devices.

        Args:
            num_ranks: `-n`.

        Raises:
            InvalidInputError: it contradicts the hosts, or cannot be divided among the nodes.
        """
        if not self.hosts:
            nodes = max(1, self.nodes)
            if num_ranks is not None and num_ranks % nodes:
                msg = (
                    f"-n {num_ranks}: {nodes} nodes take equally many ranks, such as -n {2 * nodes}"
                )
                raise InvalidInputError(msg)
            return [None if num_ranks is None else num_ranks // nodes] * nodes
        known = [host.num_ranks for host in self.hosts]
        if num_ranks is not None and (None in known or sum(filter(None, known)) != num_ranks):
            msg = f"-n {num_ranks}: over several hosts, --hosts says how many ranks each takes"
            raise InvalidInputError(msg)
        return known


LOCAL = Launch()
"""On this host."""


def parse_hosts(text: str) -> tuple[HostRequest, ...]:
    """Return the hosts of `--hosts a:4,b:4`.

    Raises:
        InvalidInputError: a name or a number is missing, or a host is named twice.
    """
    hosts = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        is_number = number.isdecimal() and int(number) > 0
        # What begins with a dash would be an option of ssh.
        if not name or name.startswith("-") or (colon and not is_number):
            msg = (
                f"--hosts {text}: write NAME:RANKS for each host, as in alpha:4,beta:4; a port "
                "or a key goes into ~/.ssh/config, under a name of its own"
            )
            raise InvalidInputError(msg)
        hosts.append(HostRequest(name, int(number) if colon else None))
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            msg = f"--hosts {text}: {name} is named twice; give it all of its ranks at once"
            raise InvalidInputError(msg)
    return tuple(hosts)
