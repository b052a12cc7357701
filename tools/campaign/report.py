"""The campaign's table, and whether it is good."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Growth, Trial

__all__ = ["Report"]

_HEAD = ("fault", "tries", "detected", "release median", "worst", "usable", "kept", "hung", "lost")
_MAX_FDS = 8
_MAX_THREADS = 4
"""What an engine may have more at the end: pools that grow to their size and stay."""


@dataclass(slots=True)
class Report:
    """All trials so far."""

    seed: int
    num_ranks: int
    trials: list[Trial] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    num_orphans: int = 0
    begun_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Since the first trial was about to begin."""
        return time.monotonic() - self.begun_s

    @property
    def is_good(self) -> bool:
        """Whether nothing hung, was lost or was left behind."""
        fds, threads, _ = self._most()
        return (
            all(t.is_detected and t.is_state_kept and not t.is_hung for t in self.trials)
            and self.num_orphans == 0
            and fds <= _MAX_FDS
            and threads <= _MAX_THREADS
        )

    def add(self, trial: Trial) -> None:
        """Take a trial in."""
        self.trials.append(trial)

    def line(self, trial: Trial) -> str:
        """Return one line on a trial, and why it is not good."""
        is_good = trial.is_detected and trial.is_state_kept and not trial.is_hung
        released = "–" if trial.release_s is None else f"{trial.release_s:.3f}"
        text = (
            f"{len(self.trials):4d} {trial.kind:32s} release {released} s, "
            f"usable after {trial.usable_s:.2f} s"
        )
        return text if is_good else f"{text}  NOT GOOD\n{trial}"

    def __str__(self) -> str:
        kinds = dict.fromkeys(t.kind for t in self.trials)
        rows = [_HEAD, *(_row(k, [t for t in self.trials if t.kind == k]) for k in kinds)]
        rows.append(_row("all", self.trials))
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return f"{table}\n{self.summary()}"

    def summary(self) -> str:
        """Return the campaign in a line."""
        fds, threads, mib = self._most()
        return (
            f"{len(self.trials)} faults on {self.num_ranks} ranks (seed {self.seed}, "
            f"{self.elapsed_s:.0f} s): {sum(t.is_detected for t in self.trials)} detected, "
            f"{sum(t.is_state_kept for t in self.trials)} with state kept, "
            f"{sum(t.is_hung for t in self.trials)} hung, {self.num_orphans} orphans, "
            f"{sum(t.num_innocent for t in self.trials)} engines lost without need; most that an "
            f"engine grew: {fds:.0f} descriptors, {threads:.0f} threads, {mib:.0f} MiB"
        )

    def _most(self) -> tuple[float, ...]:
        amounts = [growth.amounts for growth in self.growth] or [(0.0, 0.0, 0.0)]
        return tuple(max(column) for column in zip(*amounts, strict=True))


def _row(kind: str, trials: list[Trial]) -> tuple[str, ...]:
    released = [t.release_s for t in trials if t.release_s is not None]
    return (
        kind,
        str(len(trials)),
        str(sum(t.is_detected for t in trials)),
        f"{median(released):.3f} s" if released else "–",
        f"{max(released):.3f} s" if released else "–",
        f"{median(t.usable_s for t in trials):.2f} s",
        str(sum(t.is_state_kept for t in trials)),
        str(sum(t.is_hung for t in trials)),
        str(sum(t.num_innocent for t in trials)),
    )
