"""Starter: starts a session's processes on this host, and hears of their end."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from IPython.core.profiledir import ProfileDir

from dtkit.cluster._launchers import Controller, EngineSet, Launched, relying_on_curve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dtkit.cluster.placement import Slot

__all__ = ["Starter", "quiet_logger", "slot_env"]

_CONTROLLER_ARGS = [
    # Engines are registered only after two heartbeats: 3 s each by default.
    "--HeartMonitor.period=100",
    # 30 s without a beat, as by default (10 beats of 3 s).
    "--HeartMonitor.max_heartmonitor_misses=300",
]

# Any, below: ipyparallel is untyped.


class Starter:
    """ipyparallel's launchers for one session.

    Args:
        folder: the session's.
        slots: where each rank is to live.
        preload: modules that the engines import while they start.
        on_engine_exit: called with an engine and its exit code, on a thread of its own.
        on_controller_exit: called with the controller's.
    """

    def __init__(
        self,
        folder: Path,
        slots: Sequence[Slot],
        *,
        preload: Sequence[str],
        on_engine_exit: Callable[[int, int], None],
        on_controller_exit: Callable[[int], None],
    ) -> None:
        self._cluster = Launched(
            n=len(slots),
            profile_dir=str(folder),
            cluster_id="",
            delay=0.0,
            engine_launcher_class=EngineSet,
            controller_launcher_class=Controller,
            # Engines wait for the controller's file themselves, so that torch is
            # being imported while the controller starts.
            send_engines_connection_env=False,
            load_profile=False,
            shutdown_atexit=False,  # the session does it
            parent=None,
            log=quiet_logger(),
        )
        self._cluster.slot_env = tuple(
            {**slot_env(slot, preload), "DTKIT_SESSION_DIR": str(folder)} for slot in slots
        )
        self._cluster.on_engine_exit = on_engine_exit
        self._cluster.on_controller_exit = on_controller_exit

    def start_engines(self) -> None:
        """Start all engines; they wait for the controller."""
        ProfileDir.create_profile_dir(self._cluster.profile_dir)
        self._cluster.start_engines_sync()

    def start_controller(
        self, options: Sequence[str] = (), module: str = "ipyparallel.controller"
    ) -> None:
        """Start the controller.

        Args:
            options: further ones, of ipyparallel's.
            module: what is run; it takes them.
        """
        self._cluster.controller_module = module
        self._cluster.controller_args = [*_CONTROLLER_ARGS, *options]
        ProfileDir.create_profile_dir(self._cluster.profile_dir)
        self._cluster.start_controller_sync()

    def connect(self) -> Any:
        """Return a client of the controller that was started."""
        with relying_on_curve():
            return self._cluster.connect_client_sync()

    def start_again(self, engine: int) -> None:
        """Start an engine under the id of one that has ended, whoever started that."""
        if not self._cluster.engines:
            self._cluster.engines["again"] = EngineSet(
                parent=self._cluster,
                log=self._cluster.log,
                profile_dir=self._cluster.profile_dir,
                cluster_id=self._cluster.cluster_id,
                engine_set_id=str(int(time.time())),
            )
        self._cluster.engine_set.start_again(engine)

    def is_running(self, engine: int) -> bool:
        """Whether an engine that was started here runs."""
        engine_set = self._cluster.engine_set
        launcher = engine_set.launchers.get(str(engine)) if engine_set else None
        # Not the launcher's own state, which it notes in an event loop that we do not run.
        return launcher is not None and bool(launcher.process.is_running())

    def pid_of(self, engine: int) -> int:
        """Return the process of an engine that was started here."""
        return int(self._cluster.engine_set.launchers[str(engine)].pid)

    @property
    def controller_pid(self) -> int | None:
        """The controller's process, if it was started here."""
        controller = self._cluster.controller
        return int(controller.pid) if controller else None

    def pids(self) -> list[int]:
        """Return the processes that were started here."""
        engine_set = self._cluster.engine_set
        engines = [int(name) for name in engine_set.launchers] if engine_set else []
        controller = [] if self.controller_pid is None else [self.controller_pid]
        return [*controller, *map(self.pid_of, engines)]


def slot_env(
    slot: Slot, preload: Sequence[str], interface: str = "lo", address: str = "127.0.0.1"
) -> dict[str, str]:
    """Return the environment of a rank's engine.

    Args:
        slot: the rank's place.
        preload: modules that the engine imports while it starts.
        interface: of its host, through which ranks reach each other.
        address: the host's, there; all that the rank opens for others listens on it.
    """
    env = {
        "DTKIT_PRELOAD": ",".join(preload),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(slot.num_threads)),
        # Gloo binds to the host name's interface otherwise.
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "DTKIT_ADDRESS": address,
        # A failed NCCL collective must end in an exception, not in the engine's end.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        # Collectives that torch remembers: all 2000 of its default take 30 ms to read.
        "TORCH_FR_BUFFER_SIZE": os.environ.get("TORCH_FR_BUFFER_SIZE", "200"),
    }
    if slot.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = slot.gpu
    return env


def quiet_logger() -> logging.Logger:
    """Return where ipyparallel reports to: it would print its progress into the user's cell."""
    log = logging.getLogger("dtkit.cluster")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    return log
