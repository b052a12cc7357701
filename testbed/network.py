"""Hosts on one machine: network namespaces behind a switch, whose links can be made slow.

A process that runs on a host sees that host's one interface and nothing of the machine's own
network. Making hosts takes root and iproute2; slow links take the kernel's token bucket (tbf).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import signal
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import zmq

from testbed.undoing import undone_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["HEADER_BYTES", "INTERFACE", "Host", "Network", "limiting", "why_no_network"]

INTERFACE = "eth0"
"""Of every host, in its own namespace."""
HEADER_BYTES = 14 + 20 + 32
"""Of a packet, which the interface's counters count in: Ethernet, IPv4, TCP with time stamps."""
MASTER_PORT = "29500"
"""Where rank 0 listens: on a host that nobody else has, every port is free."""
_BURST = "256kb"
"""What the bucket lets pass at once: more than the largest packet that the kernel hands over."""
_LATENCY = "50ms"
_CLONE_NEWNET = 0x40000000
"""Source: sched.h."""
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with one interface.

    Attributes:
        namespace: its name.
        address: IPv4, reached from the other hosts of its network.
        rank: its place among them.
    """

    namespace: str
    address: str
    rank: int

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and threads and processes that it starts, be on this host.

        Also zmq's: its global context has threads of its own.
        """
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        context, zmq.Context._instance = zmq.Context._instance, None  # noqa: SLF001
        try:
            _set_namespace(there)
            yield
        finally:
            _set_namespace(own)
            zmq.Context._instance = context  # noqa: SLF001
            os.close(there)
            os.close(own)

    def pids(self) -> list[int]:
        """Return the processes that are on this host."""
        return [int(word) for word in _ip("netns", "pids", self.namespace).split()]

    def end_processes(self) -> None:
        """Kill every process on this host but this one."""
        here = Path(f"/run/netns/{self.namespace}").stat().st_ino
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it is gone
                held = os.pidfd_open(pid)
                # Looked at again with a descriptor in hand: numbers are given away again.
                is_there = Path(f"/proc/{pid}/ns/net").stat().st_ino == here
                if is_there and pid != os.getpid():
                    signal.pidfd_send_signal(held, signal.SIGKILL)
                os.close(held)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return what runs a command on this host; the process is the command itself."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def booted(self, name: str, folder: Path, lines: Sequence[str]) -> list[str]:
        """Return what runs a script on this host, under a name and with mounts of its own.

        Args:
            name: what the host calls itself there.
            folder: for a file.
            lines: of the script; the last one should begin with `exec`.
        """
        boot = folder / f"boot-{name}"
        boot.write_text(f"{uuid.uuid4()}\n")  # hosts that were not started together
        known_as = [
            f"hostname {name}",
            f"mount --bind {shlex.quote(str(boot))} /proc/sys/kernel/random/boot_id",
        ]
        script = "; ".join([*known_as, *lines])
        return self.command(["unshare", "--uts", "--mount", "sh", "-ec", script])


class Network:
    """Some hosts, each with a link to the same switch; a context that makes and removes them.

    Args:
        num_hosts: how many.
    """

    def __init__(self, num_hosts: int) -> None:
        self._name = f"dtkit-{os.getpid()}-{next(_numbers)}"
        self.hosts = tuple(
            Host(f"{self._name}-{i}", f"10.77.0.{i + 1}", i) for i in range(num_hosts)
        )

    def __enter__(self) -> Self:
        with undone_by(self._remove):
            self._make()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._remove()

    def limit(self, mbit_per_s: float | None) -> None:
        """Let each host send no faster than this; None: as fast as it can."""
        for host in self.hosts:
            _ip("netns", "exec", host.namespace, *limiting(mbit_per_s))

    def connect(self, host: Host, *, is_connected: bool) -> None:
        """Plug a host's link into the switch, or pull it out: the others are not told."""
        state = "up" if is_connected else "down"
        _ip("-n", f"{self._name}-switch", "link", "set", f"port{host.rank}", state)

    def ranks_environment(self, host: Host) -> dict[str, str]:
        """Return what tells a process that it is this host's one rank, as torchrun would."""
        return {
            "RANK": str(host.rank),
            "WORLD_SIZE": str(len(self.hosts)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(host.rank),
            "MASTER_ADDR": self.hosts[0].address,
            "MASTER_PORT": MASTER_PORT,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> list[str]:
        """Run a command on every host at once, as the ranks of one job; return their output.

        Raises:
            RuntimeError: one failed, or they took too long; the others are ended.
        """
        logs = [folder / f"{host.namespace}.log" for host in self.hosts]
        ranks = []
        for host, log in zip(self.hosts, logs, strict=True):
            with log.open("w") as file:
                ranks.append(
                    subprocess.Popen(
                        host.command(argv), cwd=folder, stdout=file, stderr=subprocess.STDOUT,
                        env={**environment, **self.ranks_environment(host)},
                    )
                )  # fmt: skip
        try:
            codes = [rank.wait(timeout_s) for rank in ranks]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for rank in ranks:
                rank.kill()  # harmless for one that has ended
                rank.wait()
        texts = [log.read_text() for log in logs]
        if any(codes):
            tails = "\n".join(f"host {i}: {text[-1500:]}" for i, text in enumerate(texts))
            msg = f"{' '.join(argv)} ended with {codes}\n{tails}"
            raise RuntimeError(msg)
        return texts

    def _make(self) -> None:
        switch = f"{self._name}-switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i, host in enumerate(self.hosts):
            inside = ("-n", host.namespace)
            _ip("netns", "add", host.namespace)
            _ip(
                *inside, "link", "add", INTERFACE, "type", "veth",
                "peer", "name", f"port{i}", "netns", switch,
            )  # fmt: skip
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", INTERFACE, "up")

    def _remove(self) -> None:
        for name in [f"{self._name}-switch", *(host.namespace for host in self.hosts)]:
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)


def limiting(mbit_per_s: float | None) -> list[str]:
    """Return the command that limits, on a host, how fast it sends."""
    queue = ["tc", "qdisc", "replace", "dev", INTERFACE, "root"]
    if mbit_per_s is None:
        return [*queue, "pfifo"]
    rate = f"{mbit_per_s:g}mbit"
    return [*queue, "tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY]


def why_no_network(*, is_limited: bool = False) -> str:
    """Return why there can be no network here, "" if there can; tried, not guessed.

    Args:
        is_limited: whether slow links are wanted.
    """
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network(1) as network:
            if is_limited:
                network.limit(100)
    except FileNotFoundError:
        return "iproute2 (ip, tc) is not installed"
    except RuntimeError as error:
        return str(error)
    return ""


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"ip {' '.join(words)}: {done.stderr.strip()}"
        raise RuntimeError(msg)
    return done.stdout
