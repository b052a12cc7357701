"""The campaign's table, and whether it is good."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Growth, Trial

__all__ = ["Report"]

_HEAD = ("fault", "tries", "detected", "release median", "worst", "usable", "kept", "hung", "lost")
_WARM_AFTER = 10
"""Faults of a process that are not counted: it is loading what it needs for the first time."""
_MAX_FDS = 8
_MAX_THREADS = 4
"""What a process may have more at the end: pools that grow to their size and stay."""
_MAX_MIB = 100
"""IPython keeps every cell, and the parsed source of all files that were ever in a traceback."""


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
        fds, threads, mib = self._most()
        return (
            all(t.is_detected and t.is_state_kept and not t.is_hung for t in self.trials)
            and self.num_orphans == 0
            and fds <= _MAX_FDS
            and threads <= _MAX_THREADS
            and mib <= _MAX_MIB
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
        """Return the campaign in a line, and what its processes grew in another."""
        return (
            f"{len(self.trials)} faults on {self.num_ranks} ranks (seed {self.seed}, "
            f"{self.elapsed_s:.0f} s): {sum(t.is_detected for t in self.trials)} detected, "
            f"{sum(t.is_state_kept for t in self.trials)} with state kept, "
            f"{sum(t.is_hung for t in self.trials)} hung, {self.num_orphans} orphans, "
            f"{sum(t.num_innocent for t in self.trials)} engines lost without need\n"
            f"grown after a process's first {_WARM_AFTER} faults: "
            f"at most {_amounts_text(self._most(), 0)}"
            + "".join(
                f"; {_amounts_text(slopes, 3)} per fault ({num} faults of {noun})"
                for noun, num, slopes in self._slopes()
            )
        )

    def _most(self) -> tuple[float, ...]:
        grown = [
            [after - before for before, after in zip(warm[0], warm[-1], strict=True)]
            for warm in map(_warm, self.growth)
            if warm
        ]
        return tuple(max(column) for column in zip(*(grown or [[0.0] * 3]), strict=True))

    def _slopes(self) -> list[tuple[str, int, tuple[float, ...]]]:
        """Return, of the driver and of engines, faults counted and growth per fault."""
        if not self.growth:
            return []
        driver, *engines = map(_warm, self.growth)
        found = []
        for noun, several in (("the driver", [driver]), ("engines", engines)):
            lasting = [warm for warm in several if len(warm) >= _WARM_AFTER]
            if lasting:
                num = sum(map(len, lasting))
                found.append((noun, num, tuple(_slope(lasting, i) for i in range(3))))
        return found


def _warm(growth: Growth) -> list[tuple[float, float, float]]:
    return growth.amounts[_WARM_AFTER:]


def _slope(several: list[list[tuple[float, float, float]]], column: int) -> float:
    """Return the one least-squares slope of several lines, each with a height of its own."""
    above = below = 0.0
    for amounts in several:
        values = [row[column] for row in amounts]
        middle, height = (len(values) - 1) / 2, fmean(values)
        above += sum((i - middle) * (value - height) for i, value in enumerate(values))
        below += sum((i - middle) ** 2 for i in range(len(values)))
    return above / below


def _amounts_text(amounts: tuple[float, ...], digits: int) -> str:
    names = ("descriptors", "threads", "MiB")
    return ", ".join(
        f"{amount:.{digits}f} {name}" for amount, name in zip(amounts, names, strict=True)
    )


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
