"""Patience: how long ranks wait for one that does not come."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Patience"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a tensor may wait for a rank.

    Attributes:
        warning_s: after that many seconds it is said, on rank 0; 0 means never.
        shutdown_s: after that many seconds it fails; 0 means never.
    """

    warning_s: float = 60.0
    shutdown_s: float = 0.0

    @property
    def tick_s(self) -> float | None:
        """How often to look; None: never."""
        used = [s for s in (self.warning_s, self.shutdown_s) if s > 0]
        return max(0.05, min(1.0, *(s / 4 for s in used), 1.0)) if used else None
