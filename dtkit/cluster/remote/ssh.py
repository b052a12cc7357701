"""Agents over SSH: ipyparallel's launcher for one host, several at once, with errors that help."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ipyparallel.cluster.launcher import SSHEngineLauncher
from ipyparallel.cluster.shellcmd import ShellCommandSend

from dtkit.cluster.remote.fleet import agent_command, agent_environment
from dtkit.cluster.remote.network import address_towards
from dtkit.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dtkit.launch import Launch

__all__ = ["SshFleet"]

_CONNECT_TIMEOUT_S = 10
_GREETING_TIMEOUT_S = 60.0
_WAIT_S = 3600
"""How long one connection waits for an agent's end, before the next one does."""
_NUM_TRIES = 2
"""How often in a row a connection may fail before a host counts as unreachable."""
_OPTIONS = (
    "-o", "BatchMode=yes",  # nobody can answer a question
    "-o", f"ConnectTimeout={_CONNECT_TIMEOUT_S}",
    "-o", "ServerAliveInterval=5",  # a host that has gone is noticed
)  # fmt: skip

_GREETING = """
import importlib.util, os, sys, tempfile
if importlib.util.find_spec("dtkit") is None:
    sys.exit("no dtkit for " + sys.executable)
folder = tempfile.mkdtemp(prefix="dtkit-launch-")
os.mkdir(os.path.join(folder, "log"), 0o700)
print("dtkit:" + folder)
"""
_SSH_FIXES = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED",
     "its key is another than before: find out why, then `ssh-keygen -R {host}`"),
    ("Host key verification failed",
     "its key is not known here: run `ssh {host}` once in a terminal and compare the fingerprint"),
    ("Permission denied",
     "it takes no key of yours: `ssh-copy-id {host}`, and check with `ssh {host} true`"),
    ("Could not resolve hostname",
     "no such name: check --hosts, or give it an address in ~/.ssh/config"),
    ("Connection refused", "no SSH server answers there: start sshd, or check the port"),
    ("timed out", "it does not answer: check that it is up and reachable, `ping {host}`"),
    ("No route to host", "nothing leads there: check the network, `ping {host}`"),
)  # fmt: skip
"""What ssh says, and what to do."""
_PYTHON_FIXES = (
    ("no dtkit", "install dtkit there, or name an interpreter that has it with --python PATH"),
    ("No such file", "no Python at that path there: name one with --python PATH"),
    ("not found", "no Python at that path there: name one with --python PATH"),
    ("Permission denied", "what is at that path cannot be run: name a Python with --python PATH"),
)
"""What the host's shell and Python say, and what to do."""
_SSH_FAILED = 255
"""Exit code of ssh where it failed itself. Source: ssh(1)."""

# Any, below: ipyparallel is untyped.


class _Shell(ShellCommandSend):  # type: ignore[misc]  # ipyparallel is untyped
    """Run commands on a host, quietly, and without what the greeting has done already."""

    def _check_output(self, cmd: list[str], **kwargs: Any) -> Any:
        return super()._check_output(cmd, **{"stderr": subprocess.PIPE, **kwargs})

    def has_python(self, python_path: str | None = None) -> bool:  # noqa: ARG002  its interface
        return True

    def check_output_python_module(self, module_params: list[str], **kwargs: Any) -> Any:
        if module_params[:2] == ["IPython", "profile"]:  # the folder is there
            return ""
        return super().check_output_python_module(module_params, **kwargs)


class _HostLauncher(SSHEngineLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start the agent of one host, and hear of its end."""

    on_exit: Callable[[bool], None]
    shell: _Shell
    waiting: threading.Thread | None = None
    is_over = False

    @property
    def ssh_sender(self) -> _Shell:
        return self.shell

    def _start_waiting(self) -> None:
        name = f"dtkit-ssh-{self.hostname}"
        self.waiting = threading.Thread(target=self._wait, name=name, daemon=True)
        self.waiting.start()

    def _wait(self) -> None:
        num_failed = 0
        while num_failed < _NUM_TRIES:
            is_certain = False
            try:
                self.wait_one(timeout=_WAIT_S)
                is_certain = True
            except TimeoutError:
                num_failed = 0
                continue
            except (OSError, RuntimeError, subprocess.SubprocessError):
                num_failed += 1  # the connection broke, and perhaps nothing else
            if self.is_over:
                return
            if is_certain:
                break
        self.on_exit(is_certain)


class SshFleet:
    """The agents of some hosts.

    Args:
        launch: hosts and options.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._python = launch.python or sys.executable
        self._options = [*_OPTIONS, *launch.words("ssh")]
        self.names: tuple[str, ...] = tuple(host.name for host in launch.hosts)
        self.num_agents: int = len(self.names)
        self.pids: list[int] = []
        self._launchers: dict[int, Any] = {}
        self._folders: dict[int, str] = {}

    def own_address(self) -> str:
        """Return the address of this host towards the first of the others."""
        name = self.names[0]
        config = self._run(["ssh", *self._options, "-G", name], name)
        target = re.search(r"^hostname (.+)$", config, re.MULTILINE)
        try:
            return address_towards(target[1] if target else name)
        except OSError as error:
            msg = (
                f"{name}: its name is not known here ({error}): check --hosts, or give it an "
                "address in ~/.ssh/config. If it is reached over a jump host, say with "
                "--interface NAME through which of this host's interfaces it reaches this one"
            )
            raise StartError(msg) from error

    def start(
        self, options: dict[str, Any], info: str, on_exit: Callable[..., None], log: Any
    ) -> None:
        """Start all agents at once."""

        def start(number: int) -> None:
            name = self.names[number]
            folder = self._folders[number] = self._greet(name)
            launcher = self._launchers[number] = _HostLauncher(
                ssh_args=list(self._options), scp_args=list(self._options), to_send=[],
                hostname=name, remote_python=self._python, remote_profile_dir=folder,
                engine_cmd=agent_command(self._launch), engine_args=[],
                environment={**agent_environment(options, info, number),
                             "DTKIT_AGENT_FOLDER": folder},
                profile_dir=folder, identifier=name, log=log,
            )  # fmt: skip
            where = [*self._options, name]
            launcher.shell = _Shell(["ssh"], where, self._python, initialize=False)
            launcher.on_exit = lambda is_certain: on_exit(number, is_certain=is_certain)
            try:
                launcher.shell.initialize()
                launcher.start()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                words = str(getattr(error, "stderr", "") or error).strip()
                msg = f"{name}: the agent could not be started: {words}"
                raise StartError(msg) from error

        with ThreadPoolExecutor(len(self.names), "dtkit-ssh") as pool:
            errors = [future.exception() for future in
                      [pool.submit(start, i) for i in range(self.num_agents)]]  # fmt: skip
        texts = [str(error) for error in errors if isinstance(error, StartError)]
        others = [error for error in errors if error and not isinstance(error, StartError)]
        if others:
            raise others[0]
        if texts:
            raise StartError("\n".join(texts))

    def waits_for(self) -> str:
        """Return what the hosts wait for: nothing."""
        return ""

    def log(self, number: int) -> str:
        """Return what an agent has printed."""
        launcher = self._launchers.get(number)
        return str(launcher.get_output()) if launcher else ""

    def stop(self, closed: Collection[int]) -> None:
        """End what was started, and wait for its end."""

        def stop(number: int) -> None:
            launcher = self._launchers.get(number)
            if launcher is not None:
                launcher.is_over = True
            if number not in closed:
                # A host that cannot be reached: its agent ends when it misses the controller.
                with contextlib.suppress(StartError):
                    self._bid_farewell(number)
            waiting = launcher and launcher.waiting
            if waiting and waiting is not threading.current_thread():
                waiting.join(_CONNECT_TIMEOUT_S)

        with ThreadPoolExecutor(max(1, len(self._folders)), "dtkit-ssh") as pool:
            list(pool.map(stop, list(self._folders)))
        self._folders.clear()

    def _greet(self, name: str) -> str:
        """Make a folder on a host, and return its path."""
        output = self._run(self._command(name), name, _GREETING)
        found = re.search(r"^dtkit:(.+)$", output, re.MULTILINE)
        if found is None:
            msg = f"{name}: {self._python} answered {output[-500:]!r}"
            raise StartError(msg)
        return found[1]

    def _bid_farewell(self, number: int) -> None:
        name, folder = self.names[number], self._folders[number]
        words = [self._python, "-m", "dtkit.cluster.remote.farewell", folder]
        self._run(["ssh", *self._options, name, shlex.join(words)], name)

    def _command(self, name: str) -> list[str]:
        return ["ssh", *self._options, name, self._python, "-"]

    def _run(self, command: list[str], name: str, text: str = "") -> str:
        try:
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, check=False,
                timeout=_GREETING_TIMEOUT_S,
            )  # fmt: skip
        except FileNotFoundError:
            msg = "there is no ssh on this host: install openssh-client"
            raise StartError(msg) from None
        except subprocess.TimeoutExpired:
            msg = f"{name}: no answer in {_GREETING_TIMEOUT_S:.0f} s: is `ssh {name} true` quick?"
            raise StartError(msg) from None
        if done.returncode:
            raise StartError(_explain(name, done.returncode, done.stderr.strip()))
        return done.stdout


def _explain(name: str, code: int, words: str) -> str:
    last = words.splitlines()[-1] if words else "no reason was given"
    for sign, fix in _SSH_FIXES if code == _SSH_FAILED else _PYTHON_FIXES:
        if sign in words:
            return f"{name}: {fix.format(host=name)} ({last})"
    if code != _SSH_FAILED:
        return f"{name}: --python PATH must name a Python with dtkit there, and this says: {last}"
    return f"{name}: {last}; `ssh {name} true` must work without a question"
