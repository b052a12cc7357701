"""ipyparallel's launchers, adapted: each engine its own device, and its end noticed."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipyparallel as ipp
from ipyparallel.cluster.launcher import (
    LocalControllerLauncher,
    LocalEngineLauncher,
    LocalEngineSetLauncher,
)
from traitlets.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Controller", "EngineSet", "Launched", "relying_on_curve"]


@contextlib.contextmanager
def relying_on_curve() -> Iterator[None]:
    """Keep a client from warning, in the user's cell, that it does not sign messages.

    ipyparallel signs none where CurveZMQ authenticates who sends them.
    """

    def is_shown(record: logging.LogRecord) -> bool:
        return "signing is disabled" not in record.msg

    found = get_logger()  # the kernel's own
    log = found.logger if isinstance(found, logging.LoggerAdapter) else found
    log.addFilter(is_shown)
    try:
        yield
    finally:
        log.removeFilter(is_shown)


class _Engine(LocalEngineLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start one engine under its slot's id, seeing only its slot's GPU."""

    def find_args(self) -> list[str]:
        args: list[str] = super().find_args()
        return [*args, f"--IPEngine.id={self.identifier}"]

    def get_env(self) -> dict[str, str]:
        env: dict[str, str] = super().get_env()
        return {**env, **self.parent.slot_env[int(self.identifier)]}

    def _wait(self) -> None:
        # A thread of its own, and the only one that learns the exit code.
        self.parent.on_exit(int(self.identifier), self._popen_process.wait())


class EngineSet(LocalEngineSetLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start all engines at once, each with an environment of its own."""

    launcher_class = _Engine
    delay: float = 0.0
    slot_env: tuple[dict[str, str], ...] = ()

    def __init__(self, **kwargs: Any) -> None:  # Any: traitlets arguments pass through
        super().__init__(**kwargs)
        self.engine_cmd: list[str] = [sys.executable, "-m", "dtkit.cluster._engine_main"]
        self.slot_env = self.parent.slot_env
        self.on_exit: Callable[[int, int], None] = self.parent.on_engine_exit

    def start_again(self, engine: int) -> None:
        """Start one more engine under the id of one that has ended."""
        launcher = self.launcher_class(
            work_dir=self.work_dir,
            parent=self,
            log=self.log,
            profile_dir=self.profile_dir,
            cluster_id=self.cluster_id,
            identifier=str(engine),
            # Named as ipyparallel names it: the log of the one before is continued.
            output_file=str(
                Path(self.profile_dir)
                / "log"
                / f"ipengine-{self.cluster_id}-{self.engine_set_id}-{engine}.log"
            ),
        )
        launcher.engine_cmd = list(self.engine_cmd)
        launcher.engine_args = list(self.engine_args)
        self.launchers[str(engine)] = launcher
        launcher.start()


class Controller(LocalControllerLauncher):  # type: ignore[misc]  # ipyparallel is untyped
    """Start the controller, and notice its end."""

    def find_args(self) -> list[str]:
        command = [sys.executable, "-m", self.parent.controller_module]
        return [*command, *self.cluster_args, *self.controller_args]

    def get_env(self) -> dict[str, str]:
        env: dict[str, str] = super().get_env()
        return {**env, "DTKIT_SESSION_DIR": self.profile_dir}

    def _wait(self) -> None:
        self.parent.on_controller_exit(self._popen_process.wait())


class Launched(ipp.Cluster):  # type: ignore[misc]  # ipyparallel is untyped
    """ipyparallel's cluster, with what its launchers are to know of ours."""

    slot_env: tuple[dict[str, str], ...] = ()
    controller_module: str = "ipyparallel.controller"
    on_engine_exit: Callable[[int, int], None]
    on_controller_exit: Callable[[int], None]
