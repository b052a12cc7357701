"""The driver's half of `dtkit.engine.control`: all ranks brought to the same step boundary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dtkit._ranks import format_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.cluster import Engines
    from dtkit.livecontrol import Value

__all__ = ["Boundary"]

_TIMEOUT_S = 1.0

Ranks = tuple[int, ...]


class Boundary:
    """Stops, pauses and changes a run between two steps.

    Args:
        engines: the engines.
        note: takes a line for the user.
        is_free: whether ranks make steps without each other: each has a boundary of its own.
    """

    def __init__(self, engines: Engines, note: Callable[[str], None], *, is_free: bool) -> None:
        self._engines = engines
        self._note = note
        self._is_free = is_free

    def halt(self, ranks: Ranks, action: str) -> bool:
        """Let ranks reach the same boundary, and `stop` or `pause` there.

        Returns:
            Whether that was done. If not, a rank has not said in time where it is, and might be
            past the boundary at which the others would halt: they are held; ask again.
        """
        answers = self._hold(ranks)
        if self._mute(ranks, answers) and not self._is_free:
            return False
        self._release(answers, ranks, action)
        return True

    def resume(self, ranks: Ranks) -> None:
        """Let ranks that were paused go on."""
        self._engines.control("resume", ranks=ranks, timeout_s=_TIMEOUT_S)

    def change(self, ranks: Ranks, values: dict[str, Value], *, is_paused: bool) -> None:
        """Let ranks take new values of live controls at the same boundary, and go on.

        Nobody waits there for anybody: who comes to it has been told by then.
        """
        answers = self._hold(ranks)
        mute = self._mute(ranks, answers)
        # As in `halt`; but a run must not be held up for the sake of a slider.
        change = None if mute else {"number": time.time_ns(), "values": values}
        self._release(answers, ranks, "pause" if is_paused else "run", change)
        if mute:
            name = f"{', '.join(values)} not changed"
            self._note(f"{name}: {format_ranks(mute)} did not answer; try again")

    def _hold(self, ranks: Ranks) -> dict[int, dict[str, Any]]:  # Any: JSON
        return self._engines.control("hold", ranks=ranks, timeout_s=_TIMEOUT_S)

    def _mute(self, ranks: Ranks, answers: dict[int, dict[str, Any]]) -> list[int]:
        return [r for r in ranks if r not in answers and r not in self._engines.lost]

    def _release(
        self,
        answers: dict[int, dict[str, Any]],
        ranks: Ranks,
        action: str,
        change: dict[str, Any] | None = None,
    ) -> None:
        """Let ranks go on to the last boundary that one of them has not passed."""
        boundaries = [a["next_boundary"] for a in answers.values() if "next_boundary" in a]
        until = 0 if self._is_free else max(boundaries, default=0)
        # To those that did not answer, too: they would be held when they come to it.
        request = {"until": until, "action": action, "change": change}
        self._engines.control("release", request, ranks=ranks, timeout_s=_TIMEOUT_S)
