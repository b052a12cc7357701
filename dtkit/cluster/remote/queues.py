"""Where a batch job stands, asked of its own system: Slurm, Grid Engine, PBS."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipyparallel.cluster.launcher import (
    BatchSystemLauncher,
    PBSLauncher,
    SGELauncher,
    SlurmLauncher,
)

from dtkit.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["waiting_words", "words_of"]

_TIMEOUT_S = 20.0
_NUM_LOG_CHARS = 1000
_SLURM_WAITING = ("PENDING", "CONFIGURING")
_SLURM_RUNNING = "RUNNING"
_PBS_WAITING = "QHWT"
"""Queued, held, waiting for its time, in transit. Source: qstat(1) of OpenPBS and of Torque."""
_PBS_OVER = "CEFX"
"""Completed, exiting, finished, a subjob that is over."""
_PBS_UNKNOWN = 153
"""What qstat ends with: the last byte of PBSE_UNKJOBID, 15001. Source: pbs_error.h."""
_SGE_WAITING = ("qw", "hqw", "hRwq", "Rq", "w", "h")
_SGE_ERROR = "E"

# Any, below: ipyparallel is untyped.


@dataclass(frozen=True, slots=True)
class _Standing:
    """Where a job stands.

    Attributes:
        waits: for what it waits, and where; empty: it does not wait.
        over: why its agents will not come any more; empty: they will.
    """

    waits: str = ""
    over: str = ""


def waiting_words(launcher: Any, log: Callable[[], str]) -> str:
    """Return what a job waits for; empty: it has started.

    Args:
        launcher: ipyparallel's, through which the job was submitted.
        log: returns what it has printed.

    Raises:
        StartError: it has ended.
    """
    name = type(launcher).__name__.lstrip("_").removesuffix("EngineSetLauncher")
    job = str(launcher.job_id)
    found = next(ask(job) for kind, ask in _SYSTEMS if isinstance(launcher, kind))
    if found is None:  # it does not answer
        return f"{name} job {job} has not started; ■ takes it back"
    if found.over:
        last = log().strip()[-_NUM_LOG_CHARS:]
        msg = f"{name} job {job} is over ({found.over})" + (f": {last}" if last else "")
        raise StartError(msg)
    return f"{name} job {job} waits ({found.waits}); ■ takes it back" if found.waits else ""


def _slurm(job: str) -> _Standing | None:
    words = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%P|%S"]
    found = _ask(words, lambda done: "Invalid job id" in done.stderr)
    if found is None:
        return None
    rows = [line.split("|") for line in found.splitlines()]
    waiting = [row for row in rows if row[0] in _SLURM_WAITING]
    if not waiting:
        states = sorted({row[0] for row in rows} - {_SLURM_RUNNING})
        is_running = any(row[0] == _SLURM_RUNNING for row in rows)
        return _Standing(over="" if is_running else ", ".join(states) or "gone")
    _, reason, partition, begin = waiting[0]
    queue = words_of([
        "squeue", "--noheader", "--states=PENDING", f"--partition={partition}",
        "--sort=-p,i", "--format=%i",
    ])  # fmt: skip
    place = f", place {queue.index(job) + 1} of {len(queue)}" if job in queue else ""
    when = "" if begin in ("N/A", "") else f", expected to start {begin}"
    return _Standing(f"{reason}{place}{when}")


def _grid_engine(job: str) -> _Standing | None:
    found = _ask(["qstat"])
    if found is None:
        return None
    # A row for each task that runs, and one for all that wait: number, priority, name, user, state.
    states = [row[4] for line in found.splitlines() if (row := line.split())[:1] == [job]]
    if failed := [state for state in states if state.startswith(_SGE_ERROR)]:
        told = (_ask(["qstat", "-j", job]) or "").splitlines()
        reasons = [line.partition(":")[2].strip() for line in told if "error reason" in line]
        return _Standing(over=" ".join([*failed[:1], *reasons[:1]]))
    if waiting := [state for state in states if state in _SGE_WAITING]:
        return _Standing(waiting[0])
    return _Standing(over="" if states else "gone")


def _pbs(job: str) -> _Standing | None:
    found = _ask(["qstat", job], lambda done: done.returncode == _PBS_UNKNOWN)
    if found is None:
        return None
    # Of this job alone: number, name, user, time, state, queue.
    states = [line.split()[-2] for line in found.splitlines() if line[:1].isdigit()]
    if waiting := [state for state in states if state in _PBS_WAITING]:
        return _Standing(waiting[0])
    going_on = [state for state in states if state not in _PBS_OVER]
    return _Standing(over="" if going_on else "".join(states[:1]) or "gone")


def words_of(command: Sequence[str]) -> list[str]:
    """Run a command and return the words that it prints; none if it cannot be run."""
    return (_ask(command) or "").split()


def _ask(
    command: Sequence[str],
    is_unknown: Callable[[subprocess.CompletedProcess[str]], bool] = lambda _done: False,
) -> str | None:
    """Return what a command prints, "" if it says that there is no such job; None: it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return "" if is_unknown(done) else None
    return done.stdout.strip()


_SYSTEMS: tuple[tuple[type, Callable[[str], _Standing | None]], ...] = (
    (SlurmLauncher, _slurm),
    (SGELauncher, _grid_engine),  # before PBS, which it is one of to ipyparallel
    (PBSLauncher, _pbs),
    (BatchSystemLauncher, lambda _job: None),  # LSF, HTCondor, a site's own
)
"""How the system is asked to which a launcher submits."""
