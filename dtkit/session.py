"""Session: one cluster, one process group, one event stream. Every magic is a thin face of it."""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit._ranks import format_ranks
from dtkit.celloutput import CellOutput
from dtkit.cluster import LocalCluster, Slot, place_local
from dtkit.errors import ClosedError, DtkitError, InvalidInputError
from dtkit.recipe import Recipe
from dtkit.run import Requests, Run, create_run
from dtkit.supervisor import Supervisor, release_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["RankStatus", "Session", "Transfer", "current_session", "last_run"]

_PRELOAD = ("torch", "torch.distributed", "torch.utils.data", "dtkit.engine.run")
BACKENDS = ("auto", "gloo", "nccl")


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank as `%dist_status` shows it. Memory in bytes; None where it is not known."""

    rank: int
    host: str
    pid: int
    device: str
    device_name: str
    state: str
    """idle, busy or lost."""
    used_bytes: int | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Transfer:
    """An object that was carried between the driver and a rank."""

    name: str
    value: Any  # the user's own object
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.num_bytes / 2**20:.1f} MiB in {self.seconds:.2f} s"


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
        self._generation = 0
        self._active: Requests | None = None
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
        backend = _choose_backend(backend, slots)
        session = cls(
            LocalCluster(slots, preload=_PRELOAD, on_stage=on_stage), backend, Path(runs_dir)
        )
        try:
            on_stage("importing torch and joining the process group")
            session._join()
        except BaseException:
            session.close()
            raise
        session.start_s = time.monotonic() - begun_s
        _Registry.session = session
        atexit.register(session.close)
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
        return self._active is not None

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
        return output, requests, self._steps(cell, chosen, output, requests)

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
        self._check_idle()
        run = create_run(self.runs_dir, cell, recipe or Recipe(), chosen, name)
        _Registry.run = run
        return run, self._training_steps(run)

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
        _exhaust(steps)
        return run

    def execute(self, cell: str, *, ranks: Sequence[int] | None = None) -> CellOutput:
        """Run a cell on the ranks, wait for its end, and return what it showed.

        Raises:
            RankError: the cell failed on a rank.
        """
        output, _, steps = self.running(cell, ranks=ranks)
        _exhaust(steps)
        return output

    def stop(self) -> None:
        """Ask the cell that is running to stop at the next step boundary."""
        if self._active is None:
            msg = "nothing is running on the ranks"
            raise DtkitError(msg)
        self._active.stop()

    def pull(self, name: str, *, rank: int = 0) -> Transfer:
        """Bring an object from a rank; tensors and modules arrive on the CPU.

        Raises:
            RankError: there is no such name on the rank, or it cannot be carried.
        """
        self._check_idle()
        begun_s = time.monotonic()
        payload: bytes = self._call("dtkit.engine.transfer:export", (name,), ranks=[rank])[rank]
        import cloudpickle  # loads torch, when the object has tensors

        value = cloudpickle.loads(payload)
        return Transfer(name, value, len(payload), time.monotonic() - begun_s)

    def push(
        self, objects: dict[str, Any], *, ranks: Sequence[int] | None = None
    ) -> list[Transfer]:
        """Put objects into the namespace of ranks, under their names; tensors stay on the CPU.

        Raises:
            InvalidInputError: an object cannot be pickled.
        """
        self._check_idle()
        import cloudpickle

        done = []
        for name, value in objects.items():
            begun_s = time.monotonic()
            try:
                payload = cloudpickle.dumps(value)
            except Exception as error:
                msg = f"{name} cannot be sent: {type(error).__name__}: {error}"
                raise InvalidInputError(msg) from error
            self._call("dtkit.engine.transfer:accept", (name, payload), ranks=ranks)
            done.append(Transfer(name, value, len(payload), time.monotonic() - begun_s))
        return done

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
        self._call("dtkit.engine.group:leave")
        self._join()

    def close(self) -> None:
        """End the engines and everything they started; safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        if _Registry.session is self:
            _Registry.session = None
        self._cluster.stop()

    def pids(self) -> list[int]:
        """Return the pids of all live processes of the session's cluster."""
        return self._cluster.pids()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        device = "CPU" if self.slots[0].gpu is None else "GPU"
        noun = "rank" if self.world_size == 1 else "ranks"
        return f"{self.world_size} {noun} on {device} over {self.backend}"

    def __repr__(self) -> str:
        return f"<Session: {self}{', closed' if self._is_closed else ''}>"

    def _training_steps(self, run: Run) -> Iterator[None]:
        spec = {
            "dir": str(run.dir),
            "start_unix_s": run.start_unix_s,
            "recipe": run.recipe.to_dict(),
            "ranks": list(run.ranks),
        }
        try:
            self._call("dtkit.engine.run:begin", (spec,), ranks=run.ranks)
        except BaseException as error:
            run.end("failed", error)
            self._call("dtkit.engine.run:cancel", ranks=run.ranks)
            raise
        try:
            yield from self._steps(run.cell, run.ranks, run.output, run.requests, run)
        except BaseException as error:
            if run.state == "running":
                run.end("failed", error)
            raise

    def _steps(
        self,
        cell: str,
        ranks: tuple[int, ...],
        output: CellOutput,
        requests: Requests,
        run: Run | None = None,
    ) -> Iterator[None]:
        self._check_idle()
        self._active = requests
        try:
            execution = self._engines.execute(cell, ranks, output.on_message)
            supervisor = Supervisor(self._engines, execution, requests)
            for _ in supervisor.wait():
                if run is not None and run.view().state in ("running", "pausing", "paused"):
                    run.set_state(supervisor.phase)
                yield
            epilogue = self._recover(supervisor)
            error = supervisor.error(epilogue)
            if run is not None:
                run.end(supervisor.state(), error)
            if error is not None:
                raise error
        finally:
            self._active = None

    def _recover(self, supervisor: Supervisor) -> str:
        """Rebuild the group if the cell's failure broke it; return what to tell the user."""
        if self._engines.lost:
            return (
                f"{format_ranks(self._engines.lost)} ended, the rest keep their state. "
                "%dist_shutdown and %dist_init start again"
            )
        if not supervisor.is_group_broken:
            return ""
        self.reset_group()
        text = release_text(supervisor.released, self.world_size)
        return f"{text}; group rebuilt, state kept"

    def _join(self) -> None:
        port = self._call("dtkit.engine.group:open_store", (self.world_size,), ranks=[0])[0]
        self._generation += 1
        specs = {
            slot.rank: (
                {
                    "rank": slot.rank,
                    "local_rank": slot.local_rank,
                    "world_size": self.world_size,
                    "device": slot.device,
                    "backend": self.backend,
                    "generation": self._generation,
                    "num_threads": slot.num_threads,
                    "port": port,
                },
            )
            for slot in self.slots
        }
        self.facts = self._call("dtkit.engine.group:join", specs)

    def _call(
        self,
        function: str,
        args: dict[int, tuple[Any, ...]] | tuple[Any, ...] = (),
        *,
        ranks: Sequence[int] | None = None,
    ) -> dict[int, Any]:
        self._check_open()
        return self._engines.call(function, args, ranks=ranks)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the session was shut down; start a new one with %dist_init"
            raise ClosedError(msg)

    def _check_idle(self) -> None:
        self._check_open()
        if self._active is not None:
            msg = "the ranks are busy with another cell; wait for it, or %dist_stop"
            raise DtkitError(msg)


def current_session() -> Session | None:
    """Return the open session of this process, None if there is none."""
    return _Registry.session


def last_run() -> Run | None:
    """Return the newest run of this process, None if there was none."""
    return _Registry.run


def _exhaust(steps: Iterator[None]) -> None:
    for _ in steps:
        time.sleep(0.005)


def _choose_backend(backend: str, slots: Sequence[Slot]) -> str:
    if backend not in BACKENDS:
        msg = f"--backend {backend}: choose one of {', '.join(BACKENDS)}"
        raise InvalidInputError(msg)
    has_own_gpu = all(slot.gpu is not None and not slot.shares_gpu for slot in slots)
    if backend == "nccl" and not has_own_gpu:
        msg = (
            "--backend nccl needs a GPU for each rank; use --backend gloo, or -n with at most "
            "as many ranks as there are GPUs"
        )
        raise InvalidInputError(msg)
    if backend == "auto":
        return "nccl" if has_own_gpu else "gloo"
    return backend


