"""Hosts with an SSH server each, keys made for them, and a client's configuration."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from testbed.network import Network, why_no_network
from testbed.undoing import undone_by

if TYPE_CHECKING:
    from testbed.network import Host

__all__ = ["SshHosts", "why_no_ssh_hosts"]

_SSHD = "/usr/sbin/sshd"
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class _Server:
    host: Host
    name: str
    process: subprocess.Popen[bytes]


class SshHosts:
    """Some hosts that can be logged in to from each other, by root with a key of their own.

    A context that starts and ends them. Each has a folder of
    temporary files of its own, and the name that the client's configuration has for it.

    Args:
        num_hosts: how many.
        folder: where keys, logs and temporary files go.
        hidden: a folder of this machine that the hosts from the second on see empty.
    """

    def __init__(self, num_hosts: int, folder: Path, hidden: Path | None = None) -> None:
        self.network = Network(num_hosts)
        self.names = tuple(f"host-{'abcdefgh'[i]}" for i in range(num_hosts))
        self._folder = folder
        self._hidden = hidden
        self._servers: list[_Server] = []
        self.config = folder / "ssh_config"
        self.known_hosts = folder / "known_hosts"
        self.python = folder / "python"
        """An interpreter that finds this checkout, whatever is installed."""

    def __enter__(self) -> Self:
        self.network.__enter__()
        with undone_by(self.__exit__):
            self._make_keys()
            for host, name in zip(self.network.hosts, self.names, strict=True):
                self._start(host, name)
            self._wait()
        return self

    def __exit__(self, *_exc: object) -> None:
        for name in self.names[: len(self._servers)]:
            self.end(name)
        self.network.__exit__()

    def host(self, name: str) -> Host:
        """Return the host of this name."""
        return self.network.hosts[self.names.index(name)]

    def temporary(self, name: str) -> Path:
        """Return a host's folder of temporary files."""
        return self._folder / f"tmp-{name}"

    def pids(self, name: str) -> list[int]:
        """Return the processes on a host but for its SSH server's, in this machine's numbers."""
        return [pid for pid in self.host(name).pids() if pid != os.getpid() and not _is_sshd(pid)]

    def left(self, name: str) -> list[int]:
        """Return the processes on a host that do not end; who is on the way out is waited for."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while (pids := self.pids(name)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return pids

    def end(self, name: str) -> None:
        """End a host as a loss of power does: every process on it, and only on it, at once."""
        self.host(name).end_processes()
        for server in self._servers:
            if server.name == name:
                server.process.wait()

    def _make_keys(self) -> None:
        self._keygen("user")
        for name in self.names:
            self._keygen(name)
            self.temporary(name).mkdir()
        keys = [f"{host.address} {(self._folder / f'{name}.pub').read_text()}"
                for host, name in zip(self.network.hosts, self.names, strict=True)]  # fmt: skip
        self.known_hosts.write_text("".join(keys))
        shutil.copy(self._folder / "user.pub", self._folder / "authorized_keys")
        (self._folder / "authorized_keys").chmod(0o600)
        root = Path(__file__).parents[1]
        self.python.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(root))}\n"
            f'exec {shlex.quote(sys.executable)} "$@"\n'
        )
        self.python.chmod(0o755)
        entries = [
            f"Host {name}\n  HostName {host.address}\n"
            for host, name in zip(self.network.hosts, self.names, strict=True)
        ]
        self.config.write_text(
            "".join(entries) + f"Host *\n  User root\n  IdentityFile {self._folder / 'user'}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n"
        )

    def _keygen(self, name: str) -> None:
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name)]
        subprocess.run(words, check=True)

    def _start(self, host: Host, name: str) -> None:
        config = self._folder / f"sshd-{name}"
        config.write_text(
            f"Port 22\nListenAddress {host.address}\nHostKey {self._folder / name}\n"
            f"PidFile none\nAuthorizedKeysFile {self._folder / 'authorized_keys'}\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nSubsystem sftp internal-sftp\n"
            f"SetEnv TMPDIR={self.temporary(name)} OMP_NUM_THREADS=1\n"
        )
        script = ["mkdir -p /run/sshd"]
        startup = Path.home() / ".bashrc"
        if startup.exists():  # what this machine's user does at a login is not part of the test
            script.append(f"mount --bind /dev/null {shlex.quote(str(startup))}")
        if self._hidden is not None and name != self.names[0]:
            script.append(f"mount -t tmpfs none {shlex.quote(str(self._hidden))}")
        script.append(f"exec {_SSHD} -D -e -f {shlex.quote(str(config))}")
        with (self._folder / f"sshd-{name}.log").open("wb") as log:
            process = subprocess.Popen(
                host.booted(name, self._folder, script),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._servers.append(_Server(host, name, process))

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        for server in self._servers:
            log = self._folder / f"sshd-{server.name}.log"
            while "Server listening" not in log.read_text():
                if server.process.poll() is not None or time.monotonic() > deadline:
                    msg = f"sshd on {server.name} has not started: {log.read_text()}"
                    raise RuntimeError(msg)
                time.sleep(_POLL_S)


def why_no_ssh_hosts() -> str:
    """Return why there can be no hosts with an SSH server here, "" if there can."""
    if not Path(_SSHD).exists() or shutil.which("ssh") is None:
        return "openssh-server and openssh-client are not installed"
    return why_no_network()


def _is_sshd(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"sshd" in command or command.startswith(b"unshare")
    except OSError:
        return True  # it is gone
