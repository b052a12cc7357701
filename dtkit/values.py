"""Plain values that a session answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RankStatus", "RunFacts"]


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
