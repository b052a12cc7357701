"""Agents through the launcher that an ipyparallel profile names: PBS, LSF, SGE, HTCondor."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipyparallel as ipp
from ipyparallel.cluster.launcher import BatchSystemLauncher, LauncherError, SGELauncher
from IPython.core.profiledir import ProfileDir, ProfileDirError
from IPython.paths import get_ipython_dir

from dtkit.cluster.remote.fleet import AGENT
from dtkit.cluster.remote.network import only_address
from dtkit.cluster.remote.queues import waiting_words
from dtkit.cluster.remote.told import write_told
from dtkit.errors import InvalidInputError, StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dtkit.launch import Launch

__all__ = ["ProfileFleet", "check_template"]

_ENGINE = ["-m", "ipyparallel.engine"]
_NUM_LOG_BYTES = 4000

# Any, below: ipyparallel is untyped.


class ProfileFleet:
    """Agents that an ipyparallel profile's own engine launcher starts.

    Args:
        launch: the profile, and on how many nodes.
        folder: the session's: scripts and logs go there.

    Raises:
        InvalidInputError: there is no such profile, or its launcher cannot start agents.
    """

    names: tuple[str, ...] = ()

    def __init__(self, launch: Launch, folder: Path) -> None:
        self._launch = launch
        self._folder = folder
        profile_dir = _profile_dir(launch.profile)
        self._cluster: Any = ipp.Cluster(
            profile_dir=str(profile_dir), cluster_id="", shutdown_atexit=False
        )
        self._launcher: Any = None
        self._told = profile_dir / "security" / f"{folder.name}.json"
        # Where a job can write: nodes need not see the session's folder.
        self._log = profile_dir / "log" / f"{folder.name}.log"
        self.num_agents: int = max(1, launch.nodes)
        self.pids: list[int] = []

    def own_address(self) -> str:
        """Return the address that the profile names, else the only one of this host."""
        return str(self._cluster.controller_ip) or only_address()

    def start(
        self, options: dict[str, Any], info: str, _on_exit: Callable[..., None], log: Any
    ) -> None:
        """Let the launcher start the agents; they read from a file what they are told."""
        launcher = self._cluster.engine_launcher_class(
            work_dir=str(self._folder), parent=self._cluster, log=log, cluster_id="",
            profile_dir=str(self._folder), engine_set_id=self._folder.name,
        )  # fmt: skip
        if isinstance(launcher, BatchSystemLauncher):
            check_template(launcher)
            if isinstance(launcher, SGELauncher):  # it has PBS's line, a comment to Grid Engine
                launcher.output_template = "#$ -j y\n#$ -o {output_file}"
            self._log.parent.mkdir(exist_ok=True)
            launcher.output_file = str(self._log)
            launcher._run_command = _quiet(launcher._run_command)  # noqa: SLF001  no public way
        command = list(launcher.engine_cmd)
        python = command[0] if command[1:] == _ENGINE else sys.executable
        launcher.engine_cmd = [self._launch.python or python, *AGENT]
        launcher.engine_args = ["--told", str(self._told)]
        write_told(self._told, options, json.loads(info), self.num_agents)
        try:
            started = launcher.start(self.num_agents)
            if inspect.isawaitable(started):
                asyncio.run(_result(started))
            self._launcher = launcher
        except (OSError, LauncherError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", b"") or getattr(error, "output", b"") or b""
            name, said = type(launcher).__name__, words.decode(errors="replace").strip()
            msg = f"{name} of profile {self._launch.profile} failed: {said or error}"
            raise StartError(msg) from error

    def waits_for(self) -> str:
        """Return what the agents wait for; empty: they should be here soon."""
        if not isinstance(self._launcher, BatchSystemLauncher):
            return ""
        return waiting_words(self._launcher, lambda: self.log(0))

    def log(self, _number: int) -> str:
        """Return what the agents have printed, where the launcher keeps it."""
        texts = []
        own = (p for p in (self._folder / "log").glob("*") if not p.name.startswith("ipcontroller"))
        for path in (*sorted(own), self._log):
            with contextlib.suppress(OSError):
                texts.append(path.read_text(errors="replace")[-_NUM_LOG_BYTES:])
        return "\n".join(texts)

    def stop(self, closed: Collection[int]) -> None:
        """Let the launcher end what it has started, unless the agents end by themselves."""
        self._told.unlink(missing_ok=True)
        if self._launcher is not None and len(closed) < self.num_agents:
            with contextlib.suppress(OSError, LauncherError, subprocess.CalledProcessError):
                stopped = self._launcher.stop()
                if inspect.isawaitable(stopped):
                    asyncio.run(_result(stopped))
        self._log.unlink(missing_ok=True)


def _quiet(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let what a command says go into the error instead of the kernel's own log."""
    return functools.partial(run, stderr=subprocess.PIPE)


async def _result(started: Any) -> Any:
    return await started


def _profile_dir(name: str) -> Path:
    """Return a profile's folder.

    Raises:
        InvalidInputError: there is none of this name; those there are, are named.
    """
    ipython_dir = get_ipython_dir()
    try:
        found = Path(ProfileDir.find_profile_dir_by_name(ipython_dir, name).location)
    except ProfileDirError:
        there = sorted(p.name.removeprefix("profile_") for p in Path(ipython_dir).glob("profile_*"))
        msg = (
            f"--profile {name}: there is no such profile in {ipython_dir}, only "
            f"{', '.join(there) or 'none'}; `ipython profile create --parallel {name}` makes one"
        )
        raise InvalidInputError(msg) from None
    if not (found / "ipcluster_config.py").exists():
        msg = (
            f"--profile {name}: {found} has no ipcluster_config.py that names a launcher, as in "
            'c.Cluster.engine_launcher_class = "pbs"'
        )
        raise InvalidInputError(msg)
    os.makedirs(found / "security", mode=0o700, exist_ok=True)  # noqa: PTH103  mode of this one
    return found


def check_template(launcher: Any) -> None:
    """Check that dtkit can say what a batch system's launcher runs.

    Raises:
        InvalidInputError: its template does so.
    """
    template = launcher.batch_template
    if not template and launcher.batch_template_file:
        template = Path(launcher.batch_template_file).read_text()
    template = template or launcher.default_template  # HTCondor's says ipengine
    if "{program}" not in template and "{program_and_args}" not in template:
        msg = (
            f"the batch_template of {type(launcher).__name__} says by itself what is run: write "
            "{program_and_args} in place of ipengine and its options, or in a file for HTCondor "
            'executable = {program} and arguments = "{program_args}"'
        )
        raise InvalidInputError(msg)
