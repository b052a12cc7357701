"""Result: one figure with its goal and spread; the table and the JSON file that hold them."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, field
from math import comb
from statistics import mean, median, quantiles
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Result", "Settings", "Spread", "paired", "table", "write_json"]

_NOTE_WIDTH = 96


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to measure, and where files may be left meanwhile."""

    is_quick: bool
    folder: Path

    def pick(self, usual: int, quick: int) -> int:
        """Return a count: of the usual run, or of `--quick`."""
        return quick if self.is_quick else usual


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one figure.

    Attributes:
        median: the figure.
        low: first quartile: what single rounds did.
        high: third quartile.
        sure_low: the median itself lies above this, and below `sure_high`, with 95 % confidence.
        sure_high: see `sure_low`; with fewer than six rounds these are the extremes.
        num: how many rounds.
    """

    median: float
    low: float
    high: float
    sure_low: float
    sure_high: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one or more values."""
        ordered = sorted(values)
        low, middle, high = quantiles([*ordered, *ordered], n=4, method="inclusive")
        if len(ordered) > 1:
            low, middle, high = quantiles(ordered, n=4, method="inclusive")
        i = _sure_index(len(ordered))
        return cls(middle, low, high, ordered[i], ordered[-1 - i], len(ordered))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.sure_low)} to {number(self.sure_high)})"


def _sure_index(num: int) -> int:
    """Return i so that the i-th smallest and largest of `num` values enclose the median.

    How many values lie below the true median is binomial, whatever their distribution
    (order-statistic interval; source: Conover, Practical Nonparametric Statistics, 3.2).
    """
    below = 0.0
    for i in range(num):
        below += comb(num, i) * 0.5**num
        if below > 0.025:
            return max(0, i - 1)
    return 0


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of the table.

    Attributes:
        name: what `--only` takes.
        what: the figure in words; a ratio says of what to what.
        spread: median and quartiles over `spread.num` interleaved rounds.
        unit: `×` for a ratio.
        goal: what `spread.median` is compared with; None: the figure is only told.
        better: whether less or more is better.
        num_steps: timed per side, all rounds together; for a start or a cell, how many of them.
        command: what the other side ran, or how the figure was taken.
        held_back_by: what to tell when the goal is missed.
        details: the absolute figures behind it; of this machine at this hour only.
    """

    name: str
    what: str
    spread: Spread
    unit: str
    goal: float | None
    num_steps: int
    command: str
    held_back_by: str
    better: Literal["less", "more"] = "less"
    details: dict[str, str] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        """Whether the median reaches the goal, if it has one."""
        if self.goal is None:
            return True
        if self.better == "less":
            return self.spread.median <= self.goal
        return self.spread.median >= self.goal

    @property
    def verdict(self) -> str:
        """Met or missed, with a question mark where the noise leaves it open; "" without goal."""
        if self.goal is None:
            return ""
        is_open = self.spread.sure_low < self.goal < self.spread.sure_high
        return ("met" if self.is_met else "missed") + ("?" if is_open else "")

    def to_dict(self) -> dict[str, object]:
        """Return the result as JSON holds it."""
        return {**asdict(self), "is_met": self.is_met, "verdict": self.verdict}


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the ratio of two interleaved series: of each round by itself, then the median.

    What slows a machine down for seconds slows both sides of a round.
    """
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def number(value: float) -> str:
    """Return three figures that matter."""
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def typical(values: Sequence[float], unit: str, scale: float = 1.0) -> str:
    """Return median and mean of a series, for the details."""
    return f"median {number(scale * median(values))}, mean {number(scale * mean(values))} {unit}"


def table(results: Sequence[Result]) -> str:
    """Return the results as a plain-text table, with what lies behind each below it."""
    head = ("benchmark", "median", "surely within", "quartiles", "goal", "", "rounds", "steps")
    rows = [head, *[_row(result) for result in results]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "─" * len(lines[0]))
    return "\n".join([*lines, "", *[_paragraph(result) for result in results]])


def write_json(path: Path, machine: dict[str, object], results: Sequence[Result]) -> None:
    """Write everything that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine, "results": [result.to_dict() for result in results]}
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _row(result: Result) -> tuple[str, ...]:
    spread, sign = result.spread, "≤" if result.better == "less" else "≥"
    return (
        result.name,
        f"{number(spread.median)} {result.unit}",
        f"{number(spread.sure_low)} to {number(spread.sure_high)}",
        f"{number(spread.low)} … {number(spread.high)}",
        "" if result.goal is None else f"{sign} {result.goal:g} {result.unit}",
        result.verdict,
        str(spread.num),
        str(result.num_steps),
    )


def _paragraph(result: Result) -> str:
    lines = [f"{result.name}: {result.what}"]
    lines += [f"{name}: {text}" for name, text in result.details.items()]
    lines.append(f"against: {result.command}")
    if result.goal is None or not result.is_met:
        lines.append(f"held back by: {result.held_back_by}")
    filled = [textwrap.fill(lines[0], _NOTE_WIDTH, subsequent_indent="    ")]
    filled += [
        textwrap.fill(line, _NOTE_WIDTH, initial_indent="    ", subsequent_indent="      ")
        for line in lines[1:]
    ]
    return "\n".join(filled)
