"""SessionCore: the engines of a session and the group across them, opened and closed."""

from __future__ import annotations

import atexit
import threading
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dtkit.cluster import HostCluster, Slot, Wish
from dtkit.driver.clusters import attached_cluster, new_cluster
from dtkit.driver.conductor import Conductor
from dtkit.driver.orphans import choose_orphan
from dtkit.driver.procgroup import ProcessGroup
from dtkit.driver.registry import Registry
from dtkit.driver.repair import Repair
from dtkit.driver.runs import archive
from dtkit.driver.runs.companions import accompany
from dtkit.driver.runs.followed import FollowedExecution
from dtkit.driver.runs.rundir import read_facts
from dtkit.errors import ClosedError, ClusterDiedError, DtkitError
from dtkit.events import OVER
from dtkit.guard.record import RankRun, SessionRecord
from dtkit.launch import LOCAL, Launch
from dtkit.values import DEFAULT_LEASE, Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.driver.runs.run import Run
    from dtkit.tensorboard.server import Boards

__all__ = ["SessionCore"]

_LOAD_WHEN_IDLE = (
    "sympy",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
"""Loaded by them afterwards: an optimizer's first step loads the compiler, two seconds that a
first run would otherwise spend before its first point is drawn."""


class SessionCore:
    """What every verb of a session stands on. Users have a `Session`, which adds the verbs.

    Attributes:
        slots: where each rank lives.
        backend: gloo or nccl.
        facts: what each rank said of itself when it joined, by rank.
        start_s: how long the start took, in seconds.
        warnings: what was found at the start that is better mended, each with its fix.
    """

    def __init__(self, cluster: HostCluster) -> None:
        self._cluster = cluster
        self._engines = cluster.engines
        self.slots: tuple[Slot, ...] = cluster.slots
        backend = cluster.record.backend
        self.backend: str = backend
        self.runs_dir: Path = Path(cluster.record.runs_dir)
        self.facts: dict[int, dict[str, Any]] = {}
        self.start_s: float = 0.0
        self.warnings: tuple[str, ...] = cluster.warnings
        self._group = ProcessGroup(self._engines, self.slots, backend)
        self._repair = Repair(self._engines, self._group, cluster.replace, self.facts)
        self._conductor = Conductor(self._engines, self._group, self._repair)
        self._is_closed = False
        self._ending = threading.RLock()
        """Held while the processes are being ended: who closes as well waits for that."""
        cluster.on_breakdown = self._close_broken
        self._boards: Boards | None = None

    @classmethod
    def start(  # noqa: PLR0913  as many as %dist_init has options
        cls,
        num_ranks: int | None = None,
        *,
        launch: Launch = LOCAL,
        devices: str | None = None,
        backend: str = "auto",
        oversubscribe: bool = False,
        runs_dir: str | Path = "dtkit_runs",
        lease: Lease = DEFAULT_LEASE,
        is_debug: bool = False,
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> Self:
        """Start engines and a process group across them.

        Args:
            num_ranks: how many; None means one per GPU, or per core up to 4 without one.
                Over several hosts, `launch` says how many on which.
            launch: on which hosts, and through what engines are started there.
            devices: `cpu`, or GPU indices such as `0,1`.
            backend: auto, gloo or nccl. auto takes nccl where each rank has a GPU of its own.
            oversubscribe: let ranks share a GPU.
            runs_dir: where each run gets its folder.
            lease: how long the engines live on when this process is gone.
            is_debug: let torch check every collective against the other ranks'; slower.
            on_stage: called with a short text as each stage begins.

        Raises:
            InvalidInputError: it cannot be done on this machine as asked.
            StartError: an engine did not come up.
            DtkitError: a session is open already.
        """
        _refuse_a_second()
        begun_s = time.monotonic()
        new_record = partial(
            SessionRecord.new, runs_dir=str(Path(runs_dir).resolve()),
            lease_s=lease.seconds, is_strict=lease.is_strict,
        )  # fmt: skip
        wish = Wish(num_ranks, devices, backend, oversubscribe=oversubscribe)
        session = cls(new_cluster(new_record, launch, wish, on_stage))
        try:
            on_stage("importing torch and joining the process group")
            session._group.is_debug = is_debug
            session.facts.update(session._group.build())
            session._engines.call("dtkit.engine.process.preload:begin", (_LOAD_WHEN_IDLE,))
        except BaseException:
            session.close()
            raise
        session.start_s = time.monotonic() - begun_s
        session._open()
        return session

    @classmethod
    def _take_over(cls, session_id: str | None) -> Self:
        """Open the session that a kernel left behind; see `Session.attach`."""
        _refuse_a_second()
        begun_s = time.monotonic()
        cluster = attached_cluster(choose_orphan(session_id))
        session = cls(cluster)
        try:
            session.facts.update(session._group.take_over())
        except BaseException:
            cluster.give_back()
            raise
        session.start_s = time.monotonic() - begun_s
        session._open()
        return session

    @property
    def id(self) -> str:
        """What `%dist_init --attach` calls it."""
        return self._cluster.record.id

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
        hosts = len({slot.host for slot in self.slots})
        where = f"{device} of {hosts} hosts" if hosts > 1 else device
        return f"{self.world_size} {noun} on {where} over {self.backend}"

    def __repr__(self) -> str:
        return f"<Session: {self}{', closed' if self._is_closed else ''}>"

    def _follow(self) -> tuple[Run | None, Iterator[None]]:
        """Return the newest run of the ranks, and the steps that see it to its end."""
        found = RankRun.read_all(self._cluster.dir).values()
        newest = max(found, key=lambda run: run.start_unix_s, default=None)
        if newest is None:
            return None, iter(())
        facts = read_facts(Path(newest.dir))
        if facts.state in OVER:
            Registry.run = run = archive.load(facts.dir)
            return run, iter(())
        Registry.run = run = archive.open_run(facts)
        for note in facts.notes:
            run.note(note)
        run.write()  # who drives it now
        run.at_end(lambda ended: self._cluster.bring_files(ended.dir))
        accompany(run)
        return run, self._conductor.follow(
            run, FollowedExecution(run, self._engines, self._cluster.bring_files)
        )

    def _open(self) -> None:
        Registry.session, Registry.obituary = self, ""
        atexit.register(self._close_at_exit)

    def _close(self, *, is_hurried: bool) -> None:
        with self._ending:
            if self._forget():
                try:
                    self._cluster.stop(is_hurried=is_hurried)
                finally:
                    self._close_boards()

    def _forget(self) -> bool:
        """Let go of the session; return whether it was open."""
        if self._is_closed:
            return False
        self._is_closed = True
        atexit.unregister(self._close_at_exit)
        if Registry.session is self:
            Registry.session = None
        return True

    def _close_boards(self) -> None:
        """End TensorBoard, after the engines: Jupyter kills a kernel that takes seconds to end."""
        if self._boards is not None:
            self._boards.close()

    def _close_at_exit(self) -> None:
        """End the session with its kernel, or leave a run to go on without it.

        A run in the background was told to go on by itself; one in the
        foreground goes on when the kernel is restarted, not when it is shut down.
        A kernel that dies does not come here, and leaves everything.
        """
        requests, run = self._conductor.active, Registry.run
        is_run = requests is not None and run is not None and run.requests is requests
        if requests and is_run and (requests.is_background or Registry.is_restarting()):
            requests.is_left = True
            if self._forget():
                self._cluster.leave()
                self._close_boards()
        else:
            self._close(is_hurried=True)

    def _close_broken(self) -> None:
        Registry.obituary = self._engines.broken
        self._close(is_hurried=True)

    def _check_open(self) -> None:
        if self._engines.broken:
            raise ClusterDiedError(self._engines.broken)
        if self._is_closed:
            msg = "the session was shut down; start a new one with %dist_init"
            raise ClosedError(msg)


def _refuse_a_second() -> None:
    if Registry.session is not None:
        msg = f"{Registry.session} is open; %dist_shutdown ends it"
        raise DtkitError(msg)
