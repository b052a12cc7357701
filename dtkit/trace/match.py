"""One collective, put together from the parts that each rank recorded of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dtkit.trace.rows import Collective, RankTrace

__all__ = ["Matched", "match"]


class Matched(NamedTuple):
    """A collective of which every rank's part is known."""

    group: tuple[int, ...]
    parts: dict[int, Collective]
    """By rank."""

    @property
    def start_ns(self) -> int:
        """The last rank joined: before, nobody could do anything but wait."""
        return max(part.call_ns for part in self.parts.values())

    @property
    def end_ns(self) -> int:
        """The last rank had its result; 0: not known."""
        ends = [part.done_ns for part in self.parts.values()]
        return max(ends) if all(ends) else 0

    @property
    def last_rank(self) -> int:
        """The rank that the others waited for."""
        return max(self.parts, key=lambda rank: self.parts[rank].call_ns)


def match(traces: Sequence[RankTrace]) -> list[Matched]:
    """Return the collectives of which all ranks' parts are there, in the order of their start.

    A group's collectives have the same order on all its ranks, so equal numbers
    are the same collective. What a rank has not recorded (it was killed, or its
    oldest steps are gone) is left out.
    """
    found: dict[tuple[tuple[int, ...], int], dict[int, Collective]] = {}
    for trace in traces:
        for part in _collectives(trace):
            group = trace.groups.get(part.group)
            if group is not None:
                found.setdefault((group, part.sequence), {})[trace.head.rank] = part
    whole = [
        Matched(group, parts)
        for (group, _), parts in found.items()
        if len(parts) == len(group) and len({p.operation for p in parts.values()}) == 1
    ]
    return sorted(whole, key=lambda m: (m.start_ns, min(p.sequence for p in m.parts.values())))


def _collectives(trace: RankTrace) -> Iterable[Collective]:
    return (part for step in trace.steps for part in step.collectives)
