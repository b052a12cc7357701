"""Where the ranks are, in words: each by itself, and who is waited for."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from dtkit._ranks import format_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.values import RankPlace

__all__ = ["absent", "describe", "describe_all", "format_seconds"]

_MIN_WAIT_S = 0.5
"""Nobody waits before: the ranks answer at different instants, and are then some steps apart."""


def describe(place: RankPlace) -> str:
    """Return what a rank is doing: "in all_reduce #17", "waiting for data", "in Python"."""
    if place.state != "collective":
        return {"python": "in Python", "data": "waiting for data"}.get(place.state, place.state)
    number = f" #{place.sequence}" if place.sequence is not None else ""
    group = f" of {place.group}" if place.group else ""
    return f"in {place.operation or 'a collective'}{number}{group}"


def describe_all(places: Sequence[RankPlace]) -> str:
    """Return who waits for whom in one line; empty when nobody waits in a collective."""
    waiting = _furthest(places)
    missing = absent(places)
    if not waiting or not missing:
        return ""
    first = waiting[0]
    where = f", {_at(first)}" if first.line is not None else ""
    ranks = format_ranks([place.rank for place in waiting])
    verb = "waits" if len(waiting) == 1 else "wait"
    absentees = "; ".join(f"rank {p.rank}{_on(p)} is {describe(p)}{_since(p)}" for p in missing)
    return (
        f"{format_ranks([p.rank for p in missing])} "
        f"{'has' if len(missing) == 1 else 'have'} not arrived: {ranks} {verb} {describe(first)}"
        f"{where}, for {format_seconds(statistics.median(p.seconds for p in waiting))}; {absentees}"
    )


def absent(places: Sequence[RankPlace]) -> tuple[RankPlace, ...]:
    """Return the ranks that others wait for: not in the newest collective that a rank is in.

    Ranks that are all in it are being served by the network, not waiting for anybody.
    """
    waiting = {place.rank for place in _furthest(places)}
    return tuple(place for place in places if place.rank not in waiting) if waiting else ()


def format_seconds(seconds: float) -> str:
    """Return "0.2 s", "34 s" or "3 min 20 s"."""
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _furthest(places: Sequence[RankPlace]) -> list[RankPlace]:
    """Return the ranks in the collective with the highest number; of several groups the whole."""
    inside = [p for p in places if p.state == "collective" and p.seconds >= _MIN_WAIT_S]
    whole = [place for place in inside if not place.group] or inside
    newest = max((place.sequence or 0 for place in whole), default=0)
    return [place for place in whole if (place.sequence or 0) == newest]


def _on(place: RankPlace) -> str:
    return f" on {place.host}" if place.host else ""


def _at(place: RankPlace) -> str:
    return f"{place.file or 'cell'} line {place.line}"


def _since(place: RankPlace) -> str:
    if place.line is None:
        return ""
    return f" ({_at(place)}, {format_seconds(place.seconds)})"
