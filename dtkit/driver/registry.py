"""What this process has: its open session, and its newest run, sweep and tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.driver.core import SessionCore
    from dtkit.driver.runs.run import Run
    from dtkit.driver.session import Session
    from dtkit.driver.trials.sweep import Sweep
    from dtkit.driver.trials.tune import BatchTuning, LrTuning

__all__ = ["Registry", "current_session", "last_run", "obituary"]


class Registry:
    """The open session of this process, and its newest run, sweep and tuning."""

    session: SessionCore | None = None
    run: Run | None = None
    is_restarting: Callable[[], bool] = staticmethod(lambda: False)
    """Whether this process ends because its notebook's kernel is being restarted."""
    obituary = ""
    """Why the last session ended, if that was nobody's wish."""
    sweep: Sweep | None = None
    tuning: BatchTuning | LrTuning | None = None


def current_session() -> Session | None:
    """Return the open session of this process, None if there is none."""
    return cast("Session | None", Registry.session)


def obituary() -> str:
    """Return why the last session of this process ended, if nobody wished it; else nothing."""
    return Registry.obituary


def last_run() -> Run | None:
    """Return the newest run of this process, None if there was none."""
    return Registry.run
