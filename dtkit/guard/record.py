"""SessionRecord: what a session writes down about itself, in its folder.

So a later kernel can find it, take it over or end it, and its guardian knows
what to end. The folder is named `dtkit-<id>`, belongs to the user and is closed
to everybody else; a folder for which that is not so is not looked into.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.guard.processes import Identity, boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["FOLDER_PREFIX", "RankRun", "SessionRecord", "active_ranks", "find_records", "locked",
           "notebook_name", "read_keys", "remove", "restore"]  # fmt: skip

FOLDER_PREFIX = "dtkit-"
_NAME = "session.json"
_IDLE = "idle.json"

# Any, below: JSON.


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """One session.

    Attributes:
        dir: its folder.
        slots: where each rank lives, as the cluster's `Slot` has it.
        backend: gloo or nccl.
        runs_dir: where its runs get their folders.
        lease_s: how long it lives on without a driver, seconds.
        is_strict: whether the lease also runs out while a cell is running.
        owner: the notebook it was started from, the same after a restart of its kernel.
        driver: the kernel that has it, or had it.
        processes: controller and engines; what they started themselves is found below them.
        controller: its main process; without it nobody can take the session over.
        guardian: the process that ends all of this once the lease has run out.
        boot: the boot that these processes belong to.
    """

    dir: Path
    slots: tuple[dict[str, Any], ...]
    backend: str
    runs_dir: str
    lease_s: float
    is_strict: bool
    owner: str
    driver: Identity
    processes: tuple[Identity, ...] = ()
    controller: Identity | None = None
    guardian: Identity | None = None
    boot: str = ""

    @classmethod
    def new(
        cls,
        slots: tuple[dict[str, Any], ...],
        backend: str,
        runs_dir: str,
        *,
        lease_s: float,
        is_strict: bool,
    ) -> SessionRecord:
        """Return the record of a session of this process, in a new folder of its own."""
        return cls(
            dir=Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX)),
            slots=slots,
            backend=backend,
            runs_dir=runs_dir,
            lease_s=lease_s,
            is_strict=is_strict,
            owner=notebook_name(),
            driver=_this_process(),
        )

    @property
    def id(self) -> str:
        """What the user calls it."""
        return self.dir.name.removeprefix(FOLDER_PREFIX)

    @property
    def is_orphan(self) -> bool:
        """Whether the kernel that had it is gone."""
        return not self.driver.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether any of its processes runs."""
        return any(process.is_alive for process in self.processes)

    @property
    def is_guarded(self) -> bool:
        """Whether its guardian runs."""
        return self.guardian is not None and self.guardian.is_alive

    @property
    def is_headless(self) -> bool:
        """Whether its controller has ended, so that its engines cannot be reached any more."""
        return self.controller is not None and not self.controller.is_alive

    @property
    def idle_since_unix_s(self) -> float | None:
        """Since when its lease has been running out, seconds since the epoch; None: it is not."""
        with contextlib.suppress(OSError, ValueError):
            return float(json.loads((self.dir / _IDLE).read_text())["since_unix_s"])
        return None

    def note_idle(self, since_unix_s: float | None) -> None:
        """Write down since when the lease has been running out."""
        with contextlib.suppress(OSError):  # it is for show only: the disk may be full
            if since_unix_s is None:
                (self.dir / _IDLE).unlink(missing_ok=True)
            else:
                _write_whole(self.dir / _IDLE, {"since_unix_s": since_unix_s})

    def taken_over(self) -> SessionRecord:
        """Return the record with this process as its driver."""
        return replace(self, driver=_this_process(), owner=notebook_name())

    def write(self) -> None:
        """Write it into its folder."""
        values = {**asdict(self), "boot": boot_id()}
        del values["dir"]
        _write_whole(self.dir / _NAME, values)

    @classmethod
    def read(cls, folder: Path) -> SessionRecord | None:
        """Return the record in a folder; None if there is none, or not one to be trusted."""
        if not _is_private(folder):
            return None
        try:
            values = json.loads((folder / _NAME).read_text())
            if values["boot"] != boot_id():
                return None
            guardian, controller = values["guardian"], values.get("controller")
            known: dict[str, Any] = {
                "dir": folder,
                "slots": tuple(values["slots"]),
                "driver": Identity(**values["driver"]),
                "processes": tuple(Identity(**p) for p in values["processes"]),
                "controller": controller and Identity(**controller),
                "guardian": guardian and Identity(**guardian),
            }
            return cls(**{**values, **known})
        except (OSError, ValueError, KeyError, TypeError):
            return None  # being removed, or of another version


def notebook_name() -> str:
    """Return the notebook that this kernel serves, as Jupyter's server tells it; else empty."""
    return os.environ.get("JPY_SESSION_NAME", "")


def find_records() -> tuple[SessionRecord, ...]:
    """Return the records of all this user's sessions on this host, the newest first."""
    folders = Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*")
    found = [(_age(folder), SessionRecord.read(folder)) for folder in folders]
    return tuple(record for _, record in sorted(found, key=lambda f: -f[0]) if record)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """The newest run of one rank: written by the rank itself, so it is true without a driver.

    Attributes:
        rank: the rank.
        ranks: all ranks of the run.
        process: the rank's engine.
        dir: the run's folder.
        start_unix_s: when it started, seconds since the epoch.
        state: running, finished, stopped or failed.
    """

    rank: int
    ranks: tuple[int, ...]
    process: Identity
    dir: str
    start_unix_s: float
    state: str

    def write(self, folder: Path) -> None:
        """Write it into the session's folder."""
        _write_whole(folder / f"run-{self.rank}.json", asdict(self))

    @classmethod
    def read_all(cls, folder: Path) -> dict[int, RankRun]:
        """Return the newest run of every rank that had one."""
        found = {}
        for path in folder.glob("run-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                values = json.loads(path.read_text())
                process, ranks = Identity(**values["process"]), tuple(values["ranks"])
                run = cls(**{**values, "process": process, "ranks": ranks})
                found[run.rank] = run
        return found


def active_ranks(folder: Path) -> set[int]:
    """Return the ranks that are in a run which goes on, on all of its ranks.

    A run that has ended on some of them has failed there, and the others wait
    for them in vain: nobody is training any more.
    """
    found = RankRun.read_all(folder).values()
    running = {r.rank for r in found if r.state == "running" and r.process.is_alive}
    return {r.rank for r in found if r.rank in running and running.issuperset(r.ranks)}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else take over or end the session within the context.

    Raises:
        FileNotFoundError: the session has ended.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove a session's folder, and what is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def read_keys(folder: Path) -> dict[str, bytes]:
    """Return the files in a session's folder by which its controller is reached, by path."""
    found = sorted(folder.glob("security/ipcontroller-*.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def restore(folder: Path, keys: Mapping[str, bytes]) -> None:
    """Put a session's folder back that somebody has removed, in whole or in part.

    Raises:
        OSError: it cannot be made, or somebody else has one of that name.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder):
        msg = f"{folder} is not this user's alone"
        raise PermissionError(msg)
    (folder / "log").mkdir(mode=0o700, exist_ok=True)
    if not os.access(folder / "log", os.W_OK):  # read-only: an engine without its log ends
        msg = f"{folder} cannot be written to"
        raise PermissionError(msg)
    for name, content in keys.items():
        path = folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:  # the disk may be full
            _write_private(path, content)


def _this_process() -> Identity:
    identity = Identity.of(os.getpid())
    assert identity is not None  # noqa: S101  it is us
    return identity


def _write_whole(path: Path, values: dict[str, Any]) -> None:
    """Write JSON so that a reader finds all of it, or what was there before."""
    _write_private(path, json.dumps(values).encode())


def _write_private(path: Path, content: bytes) -> None:
    """Write a file of this user's alone so that a reader finds all of it, or what was before."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    temporary.replace(path)


def _is_private(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        found = folder.lstat()
        is_closed = not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and is_closed
    return False


def _age(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.stat().st_ctime
    return 0.0
