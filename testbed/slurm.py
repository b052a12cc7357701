"""A Slurm cluster of two nodes on this machine: its real daemons, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from testbed.undoing import undone_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Slurm", "why_no_slurm", "why_no_torque"]

_DAEMONS = ("munged", "slurmctld", "slurmd")
_TORQUE = Path("/opt/slurm-wlm-torque/usr/bin")
"""Where CI unpacks it: it cannot be installed beside Grid Engine, which has the same commands."""
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.05
_CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=2
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 State=UNKNOWN
PartitionName=lab Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Slurm:
    """Two nodes, `node1` and `node2`, in the partition `lab`; a context that starts and ends them.

    Args:
        folder: configuration, logs and state.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        with undone_by(self.__exit__):
            self._write()
            self._start_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end_jobs()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in psutil.process_iter():  # a job's own daemons outlive their node's
            with contextlib.suppress(psutil.Error):  # another user's, or just gone
                if process.environ().get("SLURM_CONF") == str(self.config):
                    process.kill()

    def _end_jobs(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        with contextlib.suppress(subprocess.CalledProcessError):  # it has not come up
            while self.run("squeue", "--noheader") and time.monotonic() < deadline:
                self.run("scancel", f"--user={os.geteuid()}")
                time.sleep(_POLL_S)

    def torque(self) -> Path:
        """Return a folder with PBS's commands for this cluster: Slurm's own qsub, qstat, qdel."""
        folder = self._folder / "torque"
        folder.mkdir()
        for name in ("qsub", "qstat", "qdel"):
            (folder / name).symlink_to(_TORQUE / name)
        (folder / "sbatch").symlink_to(_path("sbatch"))  # looked for beside qsub
        return folder

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.config)}

    def run(self, *words: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        return subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip

    def _write(self) -> None:
        for name in ("munge", "state", "spool/node1", "spool/node2"):
            (self._folder / name).mkdir(parents=True, mode=0o700)
        key = self._folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller, node1, node2 = _free_ports()
        assert node2 == node1 + 1  # noqa: S101  _free_ports saw to it
        self.config.write_text(
            _CONFIG.format(
                host=socket.gethostname(), folder=self._folder, controller_port=controller,
                ports=f"{node1}-{node2}",
            )
        )  # fmt: skip

    def _start_all(self) -> None:
        munge = self._folder / "munge"
        self._start(
            "munged", "--foreground", "--force", f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}", f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}", "--num-threads=2",
        )  # fmt: skip
        self._wait((munge / "socket").exists)
        self._start("slurmctld", "-D", "-c", "-f", str(self.config))
        for node in ("node1", "node2"):
            self._start("slurmd", "-D", "-c", "-f", str(self.config), "-N", node)
        self._wait(lambda: self._states() == ["idle", "idle"])

    def _start(self, *words: str) -> None:
        with (self._folder / f"{words[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [_path(words[0]), *words[1:]], stdin=subprocess.DEVNULL, stdout=output,
                    stderr=output, env={**os.environ, **self.environment},
                )
            )  # fmt: skip

    def _states(self) -> list[str]:
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.run("sinfo", "--noheader", "--Node", "--format=%t").split()
        return []

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not is_ready():
            gone = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = "\n".join(
                    path.read_text(errors="replace")[-800:] for path in self._folder.glob("*.log")
                )
                msg = f"Slurm has not started ({gone or 'time is over'}): {logs}"
                raise RuntimeError(msg)
            time.sleep(_POLL_S)


def why_no_slurm() -> str:
    """Return why there can be no Slurm here, "" if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    missing = [name for name in _DAEMONS if not Path(_path(name)).exists()]
    return f"{', '.join(missing)} of Slurm and munge not installed" if missing else ""


def why_no_torque() -> str:
    """Return why there can be no PBS commands over Slurm here, "" if there can."""
    missing = "" if (_TORQUE / "qsub").exists() else "slurm-wlm-torque is not unpacked in /opt"
    return why_no_slurm() or missing


def _path(name: str) -> str:
    return shutil.which(name, path=f"/usr/sbin:/usr/bin:{os.environ.get('PATH', '')}") or name


def _free_ports() -> Sequence[int]:
    """Return three free ports, the last two of them neighbours."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            second = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = second.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                stack.enter_context(socket.create_server(("127.0.0.1", port + 1)))
                return first.getsockname()[1], port, port + 1
