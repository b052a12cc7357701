"""Where the ranks are while they are busy, and a run that makes no steps any more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dtkit._ranks import format_ranks
from dtkit._where import describe, describe_all, format_seconds
from dtkit.values import RankPlace

if TYPE_CHECKING:
    from dtkit.cluster import Engines
    from dtkit.driver.runs.run import Run

__all__ = ["StallWatch", "places"]

_ASK_TIMEOUT_S = 0.5
_ASK_EVERY_S = 5.0
_MIN_STALL_S = 30.0
_ASK_AFTER_S = 5.0
"""When it is asked whether the ranks that are waited for can still come."""
_STEPS = 10
"""A run is stalled when no step has ended for so many times its median step."""


def places(engines: Engines, *, timeout_s: float = 5.0) -> tuple[RankPlace, ...]:
    """Return where every rank is; those that do not answer say so."""
    answers = engines.control("where", timeout_s=timeout_s)
    found = []
    for rank in engines.ranks:
        answer = answers.get(rank, {})
        if "state" not in answer:
            answer = {"state": "lost" if rank in engines.lost else "no answer"}
        found.append(RankPlace(rank, **answer, host=engines.host_of[rank]))
    return tuple(found)


def stall_limit_s(step_ms: float) -> float:
    """Return how long a run may go without a step, seconds.

    Args:
        step_ms: the median of its steps; NaN before there are any: then for ever.
    """
    return max(_MIN_STALL_S, _STEPS * step_ms / 1000) if step_ms > 0 else float("inf")


class StallWatch:
    """Notices that a run makes no steps any more, and says whom the others wait for.

    It ends nothing: a rank may rightly be busy with an evaluation. When all that others wait
    for have ended the cell, it says so after some seconds: they made fewer steps.

    Args:
        engines: asked where the ranks are.
        run: told what was found.
    """

    def __init__(self, engines: Engines, run: Run) -> None:
        self._engines = engines
        self._run = run
        self._next_s = 0.0

    def look(self) -> None:
        """Look at the run; cheap unless it is stalled."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        idle_s, step_ms = self._run.pace()
        limit_s = stall_limit_s(step_ms)
        if not idle_s >= min(limit_s, max(_ASK_AFTER_S, _STEPS * step_ms / 1000)):  # NaN: none yet
            self._next_s = now_s + 1.0
            self._run.set_stall("")
            return
        found = places(self._engines, timeout_s=_ASK_TIMEOUT_S)
        found = tuple(place for place in found if place.rank in self._run.ranks)
        text = _in_vain(found)
        if not text and idle_s >= limit_s:
            text = describe_all(found)
        is_said = bool(text) or idle_s >= limit_s
        self._run.set_stall(_sentence(idle_s, text) if is_said else "")
        self._next_s = time.monotonic() + _ASK_EVERY_S


def _in_vain(places: tuple[RankPlace, ...]) -> str:
    """Return who waits for ranks that have ended the cell; empty if somebody may still come."""
    ended = [place.rank for place in places if place.state == "idle"]
    waiting = [place for place in places if place.state == "collective"]
    if not ended or not waiting or len(ended) + len(waiting) < len(places):
        return ""
    line = f" (cell line {waiting[0].line})" if waiting[0].line is not None else ""
    verb = "waits" if len(waiting) == 1 else "wait"
    # What has no number may be under way for all that the supervisor knows.
    press = "■" if all(place.sequence is not None for place in waiting) else "■ twice"
    return (
        f"the cell has ended on {format_ranks(ended)}, and "
        f"{format_ranks([place.rank for place in waiting])} {verb} in vain "
        f"{describe(waiting[0])}{line}: it makes more steps there. {press} frees all"
    )


def _sentence(idle_s: float, text: str) -> str:
    return f"no step for {format_seconds(idle_s)}" + (f": {text}" if text else "")
