"""SessionCore: the engines of a session and the group across them, opened and closed."""

from __future__ import annotations

import atexit
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dtkit.cluster import LocalCluster, Slot, choose_backend, place_local
from dtkit.conductor import Conductor
from dtkit.errors import ClosedError, DtkitError
from dtkit.procgroup import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.run import Run
    from dtkit.tensorboard.server import Boards

__all__ = ["Registry", "SessionCore"]

_PRELOAD = ("torch", "torch.distributed", "torch.utils.data", "dtkit.engine.run")
"""Loaded by the engines while they start."""
_LOAD_WHEN_IDLE = (
    "sympy",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
"""Loaded by them afterwards: an optimizer's first step loads the compiler, two seconds that a
first run would otherwise spend before its first point is drawn."""


class Registry:
    """The open session and the newest run of this process; `dtkit.last_run` reads it."""

    session: SessionCore | None = None
    run: Run | None = None


class SessionCore:
    """What every verb of a session stands on. Users have a `Session`, which adds the verbs.

    Attributes:
        slots: where each rank lives.
        backend: gloo or nccl.
        facts: what each rank said of itself when it joined, by rank.
        start_s: how long the start took, in seconds.
    """

    def __init__(self, cluster: LocalCluster, backend: str, runs_dir: Path) -> None:
        self._cluster = cluster
        self._engines = cluster.engines
        self.slots: tuple[Slot, ...] = cluster.slots
        self.backend = backend
        self.runs_dir = runs_dir
        self.facts: dict[int, dict[str, Any]] = {}
        self.start_s = 0.0
        self._group = ProcessGroup(self._engines, self.slots, backend)
        self._conductor = Conductor(self._engines, self._group)
        self._is_closed = False
        self._boards: Boards | None = None

    @classmethod
    def start(
        cls,
        num_ranks: int | None = None,
        *,
        devices: str | None = None,
        backend: str = "auto",
        oversubscribe: bool = False,
        runs_dir: str | Path = "dtkit_runs",
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> Self:
        """Start engines and a process group across them.

        Args:
            num_ranks: how many; None means one per GPU, or per core up to 4 without one.
            devices: `cpu`, or GPU indices such as `0,1`.
            backend: auto, gloo or nccl. auto takes nccl where each rank has a GPU of its own.
            oversubscribe: let ranks share a GPU.
            runs_dir: where each run gets its folder.
            on_stage: called with a short text as each stage begins.

        Raises:
            InvalidInputError: it cannot be done on this machine as asked.
            StartError: an engine did not come up.
            DtkitError: a session is open already.
        """
        if Registry.session is not None:
            msg = f"{Registry.session} is open; %dist_shutdown ends it"
            raise DtkitError(msg)
        begun_s = time.monotonic()
        slots = place_local(num_ranks, devices, oversubscribe=oversubscribe)
        backend = choose_backend(backend, slots)
        session = cls(
            LocalCluster(slots, preload=_PRELOAD, on_stage=on_stage), backend, Path(runs_dir)
        )
        try:
            on_stage("importing torch and joining the process group")
            session.facts = session._group.build()
            session._engines.call("dtkit.engine.preload:begin", (_LOAD_WHEN_IDLE,))
        except BaseException:
            session.close()
            raise
        session.start_s = time.monotonic() - begun_s
        Registry.session = session
        atexit.register(session._close_at_exit)
        return session

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.slots)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank."""
        return tuple(slot.rank for slot in self.slots)

    @property
    def is_busy(self) -> bool:
        """Whether a cell is running on the ranks."""
        return self._conductor.active is not None

    def close(self) -> None:
        """End the engines and everything they started; safe to call twice."""
        self._close(is_hurried=self.is_busy)

    def pids(self) -> list[int]:
        """Return the pids of all live processes of the session's cluster."""
        return self._cluster.pids()

    def environment(self) -> dict[str, Any]:
        """Return versions and devices, as they are written into every run's folder."""
        facts = self.facts.get(0, {})
        return {
            "dtkit": version("dtkit"),
            "ipyparallel": version("ipyparallel"),
            **{name: facts[name] for name in ("torch", "python", "host") if name in facts},
            "world_size": self.world_size,
            "backend": self.backend,
            "devices": sorted({fact["device_name"] for fact in self.facts.values()}),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        device = "CPU" if self.slots[0].gpu is None else "GPU"
        noun = "rank" if self.world_size == 1 else "ranks"
        return f"{self.world_size} {noun} on {device} over {self.backend}"

    def __repr__(self) -> str:
        return f"<Session: {self}{', closed' if self._is_closed else ''}>"

    def _close(self, *, is_hurried: bool) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self._close_at_exit)
        if Registry.session is self:
            Registry.session = None
        if self._boards is not None:
            self._boards.close()
        self._cluster.stop(is_hurried=is_hurried)

    def _close_at_exit(self) -> None:
        self._close(is_hurried=True)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the session was shut down; start a new one with %dist_init"
            raise ClosedError(msg)
