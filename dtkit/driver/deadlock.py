"""Ranks that wait in collectives which can never end: a run of theirs reaches no boundary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtkit.cluster import Engines

__all__ = ["Deadlock"]

_LOOK_EVERY_S = 1.0
_TIMEOUT_S = 0.5

# Any, below: JSON.
Answers = dict[int, dict[str, Any]]


class Deadlock:
    """Notices that no rank that is still in the cell can go on.

    All wait, and each in a collective that another of its ranks has not come to, and will not: that
    one has ended the cell, or waits itself. A collective that all have come to is under way,
    however slow.

    Args:
        engines: asked what the ranks wait for.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._next_s = 0.0
        self._before: list[Any] = []

    def look(self, running: Sequence[int], ended: Sequence[int]) -> bool:
        """Return whether it is so, now and at the look before; looks once a second.

        Args:
            running: the ranks that are in the cell.
            ended: those that were.
        """
        if time.monotonic() < self._next_s:
            return False
        answers = self._engines.control(
            "collectives", ranks=(*running, *ended), timeout_s=_TIMEOUT_S
        )
        waits = [answers.get(rank, {}).get("waits") for rank in running]
        is_stuck = all(wait and not _can_end(wait, answers) for wait in waits)
        before, self._before = self._before, waits if is_stuck else []
        self._next_s = time.monotonic() + _LOOK_EVERY_S
        return is_stuck and waits == before


def _can_end(wait: dict[str, Any], answers: Answers) -> bool:
    """Return whether all of a collective's ranks have come to it, as far as is known."""
    wanted = [wait["sequence"], wait["operation"]]
    for rank in wait["ranks"]:
        came = answers.get(rank, {}).get("came")
        newest = wanted if came is None else came.get(wait["group"], [0, ""])
        if newest[0] < wanted[0] or (newest[0] == wanted[0] and newest != wanted):
            return False
    return True
