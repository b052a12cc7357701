"""Plain values that a session answers with."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RankStatus"]


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
