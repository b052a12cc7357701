"""A cluster on this host: one controller and one engine per slot, all on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

import psutil
from IPython.core.profiledir import ProfileDir

from dtkit.cluster.deaths import end_session, exit_text, last_words, num_oom_kills
from dtkit.cluster.engines import Engines
from dtkit.cluster.host import HostCluster
from dtkit.cluster.launchers import Controller, EngineSet, Launched
from dtkit.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtkit.cluster.placement import Slot
    from dtkit.guard.record import SessionRecord

__all__ = ["LocalCluster"]

START_TIMEOUT_S = 120.0
_CRASH_LINES = 200
_POLL_S = 0.02

_CONTROLLER_ARGS = [
    # Engines are registered only after two heartbeats: 3 s each by default.
    "--HeartMonitor.period=100",
    # 30 s without a beat, as by default (10 beats of 3 s).
    "--HeartMonitor.max_heartmonitor_misses=300",
]


class LocalCluster(HostCluster):
    """Starts the processes of one cluster on this host.

    Args:
        record: the session's, with its folder; one engine is started for each of its slots.
        preload: modules that the engines import while they start.
        on_stage: called with a short text as each stage of the start begins.

    Raises:
        StartError: a process ended or did not answer in time; the text holds its last log lines.
    """

    def __init__(
        self,
        record: SessionRecord,
        *,
        preload: Sequence[str] = (),
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        super().__init__(record)
        self.post_guardian()
        ProfileDir.create_profile_dir(str(self.dir))
        self._cluster = Launched(
            n=len(self.slots),
            profile_dir=str(self.dir),
            cluster_id="",
            delay=0.0,
            controller_args=list(_CONTROLLER_ARGS),
            engine_launcher_class=EngineSet,
            controller_launcher_class=Controller,
            # Engines wait for the controller's file themselves, so that torch is
            # being imported while the controller starts.
            send_engines_connection_env=False,
            load_profile=False,
            shutdown_atexit=False,  # the session does it
            parent=None,
            log=_quiet_logger(),
        )
        self._cluster.slot_env = tuple(
            {**_slot_env(slot, preload), "DTKIT_SESSION_DIR": str(self.dir)} for slot in self.slots
        )
        self._cluster.on_engine_exit = self._on_engine_exit
        self._cluster.on_controller_exit = self._on_controller_exit
        self._is_stopping = False
        self._num_oom_kills = num_oom_kills()
        try:
            self.engines = self._start(on_stage)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, is_hurried: bool = False) -> None:
        """End every process of the session, those not yet written down as well."""
        self._is_stopping = True
        self._remember_processes()
        super().stop(is_hurried=is_hurried)

    def replace(self, ranks: Sequence[int]) -> None:
        """End the engines of these ranks if they live, and start new ones under the same ids.

        Raises:
            StartError: a new engine ended or did not come up in time.
        """
        engine_set = self._cluster.engine_set
        engine_of = {slot.rank: slot.engine for slot in self.slots if slot.rank in ranks}
        for engine in engine_of.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                engine_set.launchers[str(engine)].process.kill()
        deadline = time.monotonic() + START_TIMEOUT_S
        # A new engine gets the id only when the controller has forgotten the old one.
        while not self.engines.are_gone(ranks):
            self._check_alive(deadline, ())
            time.sleep(_POLL_S)
        for engine in engine_of.values():
            engine_set.start_again(engine)
        while not self.engines.are_registered(ranks):
            self._check_alive(deadline, tuple(engine_of.values()))
            time.sleep(_POLL_S)
        self._remember_processes()
        self.engines.note_return(ranks)

    def _on_engine_exit(self, engine: int, code: int) -> None:
        if self._is_stopping or not hasattr(self, "engines"):
            return
        how = exit_text(code, (self._num_oom_kills, num_oom_kills()))
        rank = next(slot.rank for slot in self.slots if slot.engine == engine)
        log = last_words(self.log_tail(engine, _CRASH_LINES))
        words = f". Last lines of its log:\n{log}" if log else ""
        self.engines.note_death(rank, f"its engine {how}{words}")
        end_session(self._cluster.engine_set.launchers[str(engine)].pid)

    def _on_controller_exit(self, code: int) -> None:
        if self._is_stopping or not hasattr(self, "engines"):
            return
        self.engines.note_breakdown(
            f"the cluster's controller {exit_text(code)}; no engine can be reached without it, so "
            "all were ended and what lived on them is gone. %dist_init starts anew"
        )
        self.on_breakdown()

    def _start(self, on_stage: Callable[[str], None]) -> Engines:
        on_stage(f"starting controller and {len(self.slots)} engines")
        cluster = self._cluster
        # Engines first: their start is the long pole (they import torch).
        cluster.start_engines_sync()
        self._remember_processes()
        cluster.start_controller_sync()
        self._remember_processes()
        client = cluster.connect_client_sync()
        engines = Engines(client, self.slots)
        on_stage("waiting for engines to register")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not engines.are_registered():
            self._check_alive(deadline, [slot.engine for slot in self.slots])
            time.sleep(_POLL_S)
        self._remember_processes()
        return engines

    def _check_alive(self, deadline: float, starting: Sequence[int]) -> None:
        gone = [engine for engine in starting if not self._is_running(engine)]
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
        cluster = self._cluster
        launchers = cluster.engine_set.launchers.values() if cluster.engine_set else ()
        controllers = [cluster.controller] if cluster.controller else []
        self.remember(launcher.pid for launcher in (*controllers, *launchers))


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


def _quiet_logger() -> logging.Logger:
    # ipyparallel would print its progress into the user's cell.
    log = logging.getLogger("dtkit.cluster")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    return log
