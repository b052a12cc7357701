"""A cluster on this host: one controller and one engine per slot, all on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipyparallel as ipp
import psutil
from ipyparallel.cluster.launcher import LocalEngineLauncher, LocalEngineSetLauncher
from IPython.core.profiledir import ProfileDir

from dtkit.cluster.engines import Engines
from dtkit.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.cluster.placement import Slot

__all__ = ["LocalCluster"]

START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 2.0
_KILL_TIMEOUT_S = 3.0
_LOG_LINES = 20

_CONTROLLER_ARGS = [
    # Engines are registered only after two heartbeats: 3 s each by default.
    "--HeartMonitor.period=100",
    # 30 s without a beat, as by default (10 beats of 3 s).
    "--HeartMonitor.max_heartmonitor_misses=300",
]


class _Engine(LocalEngineLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start one engine under its slot's id, seeing only its slot's GPU."""

    def find_args(self) -> list[str]:
        args: list[str] = super().find_args()
        return [*args, f"--IPEngine.id={self.identifier}"]

    def get_env(self) -> dict[str, str]:
        env: dict[str, str] = super().get_env()
        return {**env, **self.parent.slot_env[int(self.identifier)]}


class _EngineSet(LocalEngineSetLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start all engines at once, each with an environment of its own."""

    launcher_class = _Engine
    delay = 0.0
    slot_env: tuple[dict[str, str], ...] = ()

    def __init__(self, **kwargs: Any) -> None:  # Any: traitlets arguments pass through
        super().__init__(**kwargs)
        self.engine_cmd = [sys.executable, "-m", "dtkit.cluster._engine_main"]
        self.slot_env = self.parent.slot_env


class _Cluster(ipp.Cluster):  # type: ignore[misc]  # ipyparallel is untyped
    slot_env: tuple[dict[str, str], ...] = ()


class LocalCluster:
    """Owns the processes of one cluster on this host.

    Args:
        slots: one engine is started for each.
        preload: modules that the engines import while they start.
        on_stage: called with a short text as each stage of the start begins.

    Raises:
        StartError: a process ended or did not answer in time; the text holds its last log lines.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        preload: Sequence[str] = (),
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        self.slots = tuple(slots)
        self.dir = Path(tempfile.mkdtemp(prefix="dtkit-"))
        ProfileDir.create_profile_dir(str(self.dir))
        self._cluster = _Cluster(
            n=len(slots),
            profile_dir=str(self.dir),
            cluster_id="",
            delay=0.0,
            controller_args=list(_CONTROLLER_ARGS),
            engine_launcher_class=_EngineSet,
            # Engines wait for the controller's file themselves, so that torch is
            # being imported while the controller starts.
            send_engines_connection_env=False,
            load_profile=False,
            shutdown_atexit=False,  # the session does it
            parent=None,
            log=_quiet_logger(),
        )
        self._cluster.slot_env = tuple(_slot_env(slot, preload) for slot in slots)
        self._processes: list[psutil.Process] = []
        try:
            self.engines = self._start(on_stage)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, is_hurried: bool = False) -> None:
        """End every process of the cluster and remove its folder; safe to call twice.

        Args:
            is_hurried: kill at once. An engine in a collective does not hear a
                SIGTERM, and a notebook that is being shut down has two seconds
                before it is killed itself.
        """
        if hasattr(self, "engines"):
            self.engines.close()
        self._remember_processes()
        # Not Cluster.stop_cluster: it waits 5 s for an engine that is stuck in a
        # collective. A SIGTERM lets engines run their exit handlers; what is then
        # still there is killed.
        _end(self._processes, 0.0 if is_hurried else _STOP_TIMEOUT_S)
        shutil.rmtree(self.dir, ignore_errors=True)

    def log_tail(self, engine: int, num_lines: int = _LOG_LINES) -> str:
        """Return the last lines of an engine's log."""
        logs = sorted((self.dir / "log").glob(f"ipengine-*-{engine}.log"))
        text = "".join(path.read_text(errors="replace") for path in logs)
        return "\n".join(text.splitlines()[-num_lines:])

    def pids(self) -> list[int]:
        """Return the pids of every live process of the cluster, children included."""
        self._remember_processes()
        return [p.pid for p in self._processes if p.is_running()]

    def _start(self, on_stage: Callable[[str], None]) -> Engines:
        on_stage(f"starting controller and {len(self.slots)} engines")
        cluster = self._cluster
        # Engines first: their start is the long pole (they import torch).
        cluster.start_engines_sync()
        cluster.start_controller_sync()
        client = cluster.connect_client_sync()
        engines = Engines(client, self.slots)
        on_stage("waiting for engines to register")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not engines.are_registered():
            self._check_alive(deadline)
            time.sleep(0.02)
        self._remember_processes()
        return engines

    def _check_alive(self, deadline: float) -> None:
        gone = [slot.engine for slot in self.slots if not self._is_running(slot.engine)]
        if not gone and time.monotonic() < deadline:
            return
        what = f"engine {gone[0]} ended" if gone else f"no answer in {START_TIMEOUT_S:.0f} s"
        msg = f"the engines did not start: {what}. Last lines of its log:\n" + self.log_tail(
            gone[0] if gone else 0
        )
        raise StartError(msg)

    def _is_running(self, engine: int) -> bool:
        launcher = self._cluster.engine_set.launchers.get(str(engine))
        # Not the launcher's own state, which it notes in an event loop that we do not run.
        return launcher is not None and bool(launcher.process.is_running())

    def _remember_processes(self) -> None:
        known = {p.pid for p in self._processes}
        roots = []
        if self._cluster.controller is not None:
            roots.append(self._cluster.controller.pid)
        if self._cluster.engine_set is not None:
            roots += [el.pid for el in self._cluster.engine_set.launchers.values()]
        for pid in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                family = [process, *process.children(recursive=True)]
                self._processes += [p for p in family if p.pid not in known]


def _slot_env(slot: Slot, preload: Sequence[str]) -> dict[str, str]:
    env = {
        "DTKIT_PRELOAD": ",".join(preload),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(slot.num_threads)),
        # Gloo binds to the host name's interface otherwise.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # A failed NCCL collective must end in an exception, not in the engine's end.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        # Collectives that torch remembers: all 2000 of its default take 30 ms to read.
        "TORCH_FR_BUFFER_SIZE": os.environ.get("TORCH_FR_BUFFER_SIZE", "200"),
    }
    if slot.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = slot.gpu
    return env


def _end(processes: Sequence[psutil.Process], grace_s: float) -> None:
    """Terminate, then kill. psutil compares start times, so a reused pid is left alone.

    Args:
        processes: whom to end.
        grace_s: how long they may take after a SIGTERM; 0 sends no SIGTERM.
    """
    alive = list(processes)
    if grace_s:
        _signal(alive, signal.SIGTERM)
        _, alive = psutil.wait_procs(alive, timeout=grace_s)
    _signal(alive, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=_KILL_TIMEOUT_S)


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _quiet_logger() -> logging.Logger:
    # ipyparallel would print its progress into the user's cell.
    log = logging.getLogger("dtkit.cluster")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    return log
