"""Grid Engine on hosts of this machine: its real daemons, with a cell in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from testbed.network import Network, why_no_network
from testbed.undoing import undone_by

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["GridEngine", "command_of", "why_no_grid_engine"]

_SHARE = Path("/usr/share/gridengine")
_PROGRAMS = Path("/usr/lib/gridengine")
_NAMES = ("host-a", "host-b")
_NUM_SLOTS = 2
_START_TIMEOUT_S = 60.0
_POLL_S = 0.05
_BOOTSTRAP = """\
admin_user none
default_domain none
ignore_fqdn true
spooling_method classic
spooling_lib libspoolc
spooling_params {root}/default/common;{root}/qmaster
binary_path /usr/sbin
qmaster_spool_dir {root}/qmaster
security_mode none
listener_threads 1
worker_threads 1
scheduler_threads 1
"""
_CONFIGURATION = {
    "execd_spool_dir": "{root}/execd",
    "min_uid": "0",  # jobs are root's
    "min_gid": "0",
    "load_report_time": "00:00:01",
}
"""What differs from Debian's."""
_SCHEDULER = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
_QUEUE = {
    "hostlist": "{hosts}",
    "slots": str(_NUM_SLOTS),
    "pe_list": "smp",
    "shell": "/bin/sh",
    "tmpdir": "{temporary}",
    "load_thresholds": "NONE",  # whatever else this machine does
    "rerun": "FALSE",
}
"""What differs from Grid Engine's own template of a queue."""


class GridEngine:
    """Two hosts of two slots each, in the queue `all.q`; a context that starts and ends them.

    The first has the queue master, too, and is where the commands in `bin` are run.

    Args:
        folder: configuration, logs and state.
    """

    def __init__(self, folder: Path) -> None:
        self.names = _NAMES
        self.network = Network(len(_NAMES))
        self.bin = folder / "bin"
        self._folder = folder
        self._root = folder / "sge"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.network.__enter__()
        with undone_by(self.__exit__):
            self._write()
            self._start_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        for host in self.network.hosts:
            host.end_processes()
        for daemon in self._daemons:
            daemon.wait()
        self.network.__exit__()

    @property
    def environment(self) -> dict[str, str]:
        """What Grid Engine's commands need to find this cell, and to be found."""
        return {
            "SGE_ROOT": str(self._root), "SGE_CELL": "default", "SGE_QMASTER_PORT": "6444",
            "SGE_EXECD_PORT": "6445", "PATH": f"{self.bin}:{os.environ['PATH']}",
        }  # fmt: skip

    def pids(self, name: str) -> list[int]:
        """Return the processes on a host but for Grid Engine's own."""
        return [
            pid for pid in self.network.hosts[self.names.index(name)].pids()
            if pid != os.getpid() and (command := command_of(pid)) and "sge_" not in command
        ]  # fmt: skip

    def run(self, *words: str) -> str:
        """Run one of Grid Engine's commands on the first host and return what it prints."""
        return subprocess.run(
            [str(self.bin / words[0]), *words[1:]], env={**os.environ, **self.environment},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    def _write(self) -> None:
        common = self._root / "default" / "common"
        for folder in (common, self._root / "qmaster/job_scripts", self._root / "execd", self.bin):
            folder.mkdir(parents=True)
        (self._root / "util").symlink_to(_SHARE / "util")
        (common / "bootstrap").write_text(_BOOTSTRAP.format(root=self._root))
        (common / "act_qmaster").write_text(f"{_NAMES[0]}\n")
        default = (_SHARE / "default-configuration").read_text()
        (self._root / "configuration").write_text(
            _changed(default, _CONFIGURATION).format(root=self._root)
        )
        entries = [
            f"{host.address} {name}\n"
            for host, name in zip(self.network.hosts, _NAMES, strict=True)
        ]
        (self._folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(entries))

    def _start_all(self) -> None:
        spool = shlex.quote(f"{self._root}/default/common;{self._root}/qmaster")
        make = [
            f"{_PROGRAMS}/spoolinit classic libspoolc {spool} init",
            f"{_PROGRAMS}/spooldefaults configuration {self._root}/configuration",
            f"{_PROGRAMS}/spooldefaults complexes {_SHARE}/util/resources/centry",
            f"{_PROGRAMS}/spooldefaults usersets {_SHARE}/util/resources/usersets",
            f"{_PROGRAMS}/spooldefaults pes {_SHARE}/util/resources/pe",
            f"{_PROGRAMS}/spooldefaults managers root",
        ]
        master = self._start(0, "sge_qmaster", make)
        inside = ["nsenter", f"--target={master.pid}", "--net", "--uts", "--mount"]
        for name in ("qconf", "qdel", "qmod", "qstat", "qsub"):
            script = self.bin / name
            script.write_text(f'#!/bin/sh\nexec {shlex.join(inside)} /usr/bin/{name} "$@"\n')
            script.chmod(0o755)
        self._wait("qconf", "-sconf")
        self.run("qconf", "-ah", ",".join(_NAMES))
        self.run("qconf", "-as", _NAMES[0])
        for number in range(len(_NAMES)):
            self._start(number, "sge_execd", ())
        self._set_up()
        self._wait(
            "qstat", "-f", until=rf"(all\.q@\S+ +\S+ +0/0/{_NUM_SLOTS} +\S+ +lx\S+ *\n.*){{2}}"
        )

    def _set_up(self) -> None:
        scheduler = _changed(self.run("qconf", "-ssconf"), _SCHEDULER)
        self._configure("-Msconf", scheduler)
        queue = _changed(self.run("qconf", "-sq"), {"qname": "all.q", **_QUEUE})
        tmpdirs = (f"[{name}={self.temporary(name)}]" for name in _NAMES)
        self._configure(
            "-Aq",
            queue.format(hosts=" ".join(_NAMES), temporary=",".join(["NONE", *tmpdirs])),
        )

    def _configure(self, option: str, text: str) -> None:
        path = self._folder / "qconf"
        path.write_text(text)
        self.run("qconf", option, str(path))

    def temporary(self, name: str) -> Path:
        """Return the folder in which a host's jobs have theirs for temporary files."""
        return self._folder / f"tmp-{name}"

    def _start(self, number: int, program: str, lines: Sequence[str]) -> subprocess.Popen[bytes]:
        host, name = self.network.hosts[number], _NAMES[number]
        self.temporary(name).mkdir(exist_ok=True)
        hosts = shlex.quote(str(self._folder / "hosts"))
        script = [f"mount --bind {hosts} /etc/hosts", *lines, f"exec /usr/sbin/{program}"]
        with (self._folder / f"{program}-{name}.out").open("wb") as output:
            daemon = subprocess.Popen(
                host.booted(name, self._folder, script), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, env={**os.environ, **self.environment, "SGE_ND": "1"},
            )  # fmt: skip
        self._daemons.append(daemon)
        return daemon

    def _wait(self, *words: str, until: str = "") -> None:
        """Wait until a command succeeds, and what it prints matches."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        printed = ""
        while True:
            try:
                printed = self.run(*words)
            except subprocess.CalledProcessError as error:
                printed = error.stderr
            else:
                if re.search(until, printed, re.DOTALL):
                    return
            gone = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = [*self._folder.glob("*.out"), *self._root.glob("**/messages")]
                told = "\n".join(path.read_text(errors="replace")[-800:] for path in logs)
                msg = f"Grid Engine has not started ({gone or 'time is over'}): {printed} {told}"
                raise RuntimeError(msg)
            time.sleep(_POLL_S)


def _changed(text: str, values: Mapping[str, str]) -> str:
    """Return one of Grid Engine's configurations with other values for some names."""
    lines = [(line, line.partition(" ")[0].strip()) for line in text.splitlines()]
    return "".join(f"{name} {values[name]}\n" if name in values else f"{line}\n"
                   for line, name in lines)  # fmt: skip


def command_of(pid: int) -> str:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def why_no_grid_engine() -> str:
    """Return why there can be no Grid Engine here, "" if there can."""
    needed = ("sge_qmaster", "sge_execd", "qsub")
    missing = [name for name in needed if not (_PROGRAMS / name).exists()]
    if missing:
        return f"{', '.join(missing)} of Grid Engine not installed"
    return why_no_network()
