"""The table: a row for each task, a column for each peer, and how it compares with dtkit."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.peers.tasks import ROWS
from benchmarks.result import Spread, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peers.tasks import Said

__all__ = ["OURS", "Found"]

OURS = "dtkit"


@dataclass(slots=True)
class Found:
    """All that was measured.

    Attributes:
        until_s: on `time.monotonic()`; nothing is begun afterwards.
        numbers: by row and peer, in rounds, in seconds or bytes.
        facts: by row and peer, in rounds.
        missing: by row and peer, why there is no number.
    """

    until_s: float
    numbers: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    facts: dict[str, dict[str, list[bool]]] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, peer: str, round_number: int, said: Said) -> None:
        """Add what one round with one peer found."""
        for row, value in said.numbers.items():
            self.numbers.setdefault(row, {}).setdefault(peer, {})[round_number] = value
        for row, fact in said.facts.items():
            self.facts.setdefault(row, {}).setdefault(peer, []).append(fact)
        for row, reason in said.missing.items():
            self.missing.setdefault(row, {})[peer] = reason

    def is_late(self) -> bool:
        """Return whether the time is over."""
        return time.monotonic() > self.until_s

    def rows(self) -> list[str]:
        """Return the rows about which there is something to say."""
        return [row for row in ROWS if row in {*self.numbers, *self.facts, *self.missing}]

    def ratio(self, row: str, peer: str) -> Spread | None:
        """Return the peer's numbers over dtkit's of the same rounds."""
        ours, theirs = (self.numbers.get(row, {}).get(name, {}) for name in (OURS, peer))
        both = [theirs[i] / ours[i] for i in theirs if i in ours]
        return Spread.of(both) if both and peer != OURS else None

    def cell(self, row: str, peer: str) -> str:
        """Return a cell of the table; it has the reason where there is nothing else."""
        facts = self.facts.get(row, {}).get(peer)
        if facts:
            return _yes_or_no(facts)
        rounds = self.numbers.get(row, {}).get(peer)
        reason = self.missing.get(row, {}).get(peer, "")
        if not rounds:
            return reason or "–"
        ratio = self.ratio(row, peer)
        text = number(ROWS[row].scale * median(rounds.values()))
        if ratio is not None:
            low, high = _times(ratio.sure_low), _times(ratio.sure_high)
            spread = f"; {low}–{high}" if ratio.num > 1 else ""
            text += f"<br>({_times(ratio.median)} ×{spread})"
        return f"{text}; once {reason}" if reason else text

    def to_markdown(self, peers: Sequence[str]) -> str:
        """Return the table, as it stands in the documentation."""
        lines = ["|  | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
        for row in self.rows():
            unit = f", {ROWS[row].unit}" if ROWS[row].unit else ""
            cells = [self.cell(row, peer) for peer in peers]
            lines.append(f"| {ROWS[row].what}{unit} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    @classmethod
    def read(cls, reports: Sequence[dict[str, Any]]) -> Found:
        """Return what several runs have found, each of rows of its own; see `to_dict`."""
        found = cls(0.0)
        for report in reports:
            for row, peers in report["numbers"].items():
                found.numbers[row] = {
                    peer: {int(i): value for i, value in rounds.items()}
                    for peer, rounds in peers.items()
                }
            found.facts |= report["facts"]
            found.missing |= report["missing"]
        return found

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON holds it."""
        return {"numbers": self.numbers, "facts": self.facts, "missing": self.missing}


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _yes_or_no(facts: Sequence[bool]) -> str:
    counts = Counter(facts)
    if len(counts) == 1:
        return "yes" if facts[0] else "no"
    return f"{counts[True]} of {len(facts)} times"
