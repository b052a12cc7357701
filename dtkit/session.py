"""Session: one cluster, one process group, one event stream. Every magic is a thin face of it."""

from __future__ import annotations

import atexit
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dtkit.celloutput import CellOutput
from dtkit.cluster import LocalCluster, Slot, choose_backend, place_local
from dtkit.conductor import Conductor
from dtkit.errors import ClosedError, DtkitError
from dtkit.procgroup import ProcessGroup
from dtkit.recipe import Recipe
from dtkit.run import Requests, Run, create_run
from dtkit.transfer import Transfer, pull, push
from dtkit.values import RankStatus
from dtkit.waiting import drive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Session", "current_session", "last_run"]

# The compiler last: an optimizer's first step loads it, two seconds that a first
# run would otherwise spend before its first point is drawn.
_PRELOAD = ("torch", "torch.distributed", "torch.utils.data", "dtkit.engine.run", "torch._dynamo")


class _Registry:
    """The open session and the newest run of this process; `dtkit.last_run` reads it."""

    session: Session | None = None
    run: Run | None = None


class Session:
    """Engines with a process group across them. Make one with `Session.start`.

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
    ) -> Session:
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
        if _Registry.session is not None:
            msg = f"{_Registry.session} is open; %dist_shutdown ends it"
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
        except BaseException:
            session.close()
            raise
        session.start_s = time.monotonic() - begun_s
        _Registry.session = session
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

    def running(
        self, cell: str, *, ranks: Sequence[int] | None = None
    ) -> tuple[CellOutput, Requests, Iterator[None]]:
        """Send a cell to ranks, without a run.

        Returns:
            What it shows, a place for requests, and an iterator to be exhausted:
            it yields while the cell runs, and raises `RankError` if it fails.
        """
        chosen = self.ranks if ranks is None else tuple(ranks)
        output, requests = CellOutput(chosen), Requests()
        return output, requests, self._conductor.run(cell, chosen, output, requests)

    def training(
        self,
        cell: str,
        *,
        recipe: Recipe | None = None,
        name: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> tuple[Run, Iterator[None]]:
        """Send a training cell to ranks.

        Returns:
            The run, and an iterator to be exhausted: it yields while the run
            goes on, and raises `RankError` if it fails.
        """
        chosen = self.ranks if ranks is None else tuple(ranks)
        self._check_open()
        self._conductor.check_idle()
        run = create_run(self.runs_dir, cell, recipe or Recipe(), chosen, name)
        _Registry.run = run
        return run, self._conductor.train(run)

    def train(
        self,
        cell: str,
        *,
        recipe: Recipe | None = None,
        name: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> Run:
        """Train a cell on the ranks, wait for its end, and return the run; no dashboard.

        Raises:
            RankError: the cell failed on a rank.
        """
        run, steps = self.training(cell, recipe=recipe, name=name, ranks=ranks)
        drive(steps, run.requests)
        return run

    def execute(self, cell: str, *, ranks: Sequence[int] | None = None) -> CellOutput:
        """Run a cell on the ranks, wait for its end, and return what it showed.

        Raises:
            RankError: the cell failed on a rank.
        """
        output, requests, steps = self.running(cell, ranks=ranks)
        drive(steps, requests)
        return output

    def stop(self) -> None:
        """Ask the cell that is running to stop at the next step boundary."""
        if self._conductor.active is None:
            msg = "nothing is running on the ranks"
            raise DtkitError(msg)
        self._conductor.active.stop()

    def pull(self, name: str, *, rank: int = 0) -> Transfer:
        """Bring an object from a rank; tensors and modules arrive on the CPU.

        Raises:
            InvalidInputError: there is no such name on the rank, or it cannot be carried.
        """
        self._check_open()
        self._conductor.check_idle()
        return pull(self._engines, name, rank)

    def push(
        self, objects: dict[str, Any], *, ranks: Sequence[int] | None = None
    ) -> list[Transfer]:
        """Put objects into the namespace of ranks, under their names; tensors stay on the CPU.

        Raises:
            InvalidInputError: an object cannot be pickled.
        """
        self._check_open()
        self._conductor.check_idle()
        return [push(self._engines, name, value, ranks) for name, value in objects.items()]

    def status(self) -> tuple[RankStatus, ...]:
        """Return where every rank is; answers while they are busy."""
        self._check_open()
        answers = self._engines.control("status")
        found = []
        for slot in self.slots:
            fact, answer = self.facts.get(slot.rank, {}), answers.get(slot.rank, {})
            is_lost = slot.rank in self._engines.lost
            found.append(
                RankStatus(
                    rank=slot.rank,
                    host=fact.get("host", ""),
                    pid=fact.get("pid", 0),
                    device=fact.get("device", slot.device),
                    device_name=fact.get("device_name", ""),
                    state="lost" if is_lost else answer.get("state", "no answer"),
                    used_bytes=answer.get("used_bytes"),
                    total_bytes=answer.get("total_bytes"),
                )
            )
        return tuple(found)

    def reset_group(self) -> None:
        """Build the process group anew; the ranks keep their namespaces."""
        self._check_open()
        self._conductor.check_idle()
        self._group.rebuild()

    def close(self) -> None:
        """End the engines and everything they started; safe to call twice."""
        self._close(is_hurried=self.is_busy)

    def pids(self) -> list[int]:
        """Return the pids of all live processes of the session's cluster."""
        return self._cluster.pids()

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
        if _Registry.session is self:
            _Registry.session = None
        self._cluster.stop(is_hurried=is_hurried)

    def _close_at_exit(self) -> None:
        self._close(is_hurried=True)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the session was shut down; start a new one with %dist_init"
            raise ClosedError(msg)


def current_session() -> Session | None:
    """Return the open session of this process, None if there is none."""
    return _Registry.session


def last_run() -> Run | None:
    """Return the newest run of this process, None if there was none."""
    return _Registry.run
