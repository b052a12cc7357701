"""Plain values that a session answers with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "DEFAULT_LEASE",
    "HostCheck",
    "HostLink",
    "Lease",
    "Orphan",
    "RankPlace",
    "RankStatus",
    "RunFacts",
]


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
class RankPlace:
    """Where one rank is, as `%dist_where` shows it.

    Attributes:
        rank: the rank.
        state: idle, python (computing, or anything else), data, collective, lost,
            or no answer (it holds Python's lock, or is stopped).
        line: the cell's line, or the script's; None while idle.
        file: the script that `line` belongs to; empty: the cell.
        operation: the collective's name, such as all_reduce.
        sequence: its number in its group, from 1; None where gloo does not number it.
        group: `group` and its description, or `ranks` and its ranks; empty for the whole group.
        seconds: how long it has been in the collective or has waited for data;
            else since the cell began.
        host: what the user calls the rank's host; empty where all are on the notebook's.
    """

    rank: int
    state: str
    line: int | None = None
    file: str = ""
    operation: str = ""
    sequence: int | None = None
    group: str = ""
    seconds: float = 0.0
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """The way from one host to another.

    Attributes:
        source: who connected.
        target: to whom.
        address: of the target, on the interface that ranks use.
        latency_ms: median of a few round trips over TCP; None: it was not reached.
        mbit_per_s: over one connection, in one direction; None: not measured.
        error: why it was not reached.
    """

    source: str
    target: str
    address: str
    latency_ms: float | None = None
    mbit_per_s: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCheck:
    """What a look at hosts has found before they get engines.

    Attributes:
        problems: why they cannot train together, each with its fix.
        warnings: what is better mended, each with its fix.
        links: how well they reach each other.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    links: tuple[HostLink, ...]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run's `run.json` tells; all but name and folder may be missing in an old one."""

    name: str
    dir: Path
    state: str = "failed"
    recipe: dict[str, Any] = field(default_factory=dict)  # Any: JSON, perhaps of another version
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (0,)
    start_unix_s: float = 0.0
    elapsed_s: float = 0.0
    num_steps: int = 0
    loss: float | None = None
    """Smoothed, of the last step; None: none was seen."""
    notes: tuple[str, ...] = ()
    error: str | None = None
    driver: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lease:
    """How long a session lives on when the kernel that has it is gone.

    Attributes:
        minutes: counted while no run goes on.
        is_strict: count them during a run as well, and end it with the session.
    """

    minutes: float = 15.0
    is_strict: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minutes) and self.minutes >= 0):
            msg = f"--lease {self.minutes:g}: give minutes, 0 or more, for example --lease 15"
            raise InvalidInputError(msg)

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return 60.0 * self.minutes


DEFAULT_LEASE = Lease()


@dataclass(frozen=True, slots=True)
class Orphan:
    """A session whose kernel is gone, as `%dist_orphans` shows it."""

    id: str
    num_ranks: int
    backend: str
    notebook: str
    """The notebook it was started from; empty where Jupyter does not tell."""
    run: str
    """Name of the run that goes on; empty when none does."""
    left_s: float | None
    """Seconds until it ends by itself; None: not while the run goes on, or no guardian is left."""
    has_guardian: bool
    is_headless: bool
    """Whether its controller has ended, so that it can only be ended."""
    num_processes: int
