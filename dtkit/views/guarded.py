"""A dashboard that cannot take the training down with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.views.terminal import TextDashboard

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.output import OutputBlock
    from dtkit.telemetry.view import RunView
    from dtkit.views.dashboard import Dashboard

    Blocks = tuple[OutputBlock, ...]

__all__ = ["GuardedDashboard"]


class GuardedDashboard:
    """Shows a run through another dashboard, and in text once that one fails.

    Args:
        dashboard: the one to use.
        on_failure: called with a line that says what failed.
    """

    def __init__(self, dashboard: Dashboard, on_failure: Callable[[str], None]) -> None:
        self._dashboard = dashboard
        self._on_failure = on_failure
        self._has_failed = False

    def start(self, view: RunView) -> None:
        """Show the run."""
        self._try(lambda: self._dashboard.start(view))

    def is_due(self) -> bool:
        """Return whether `update` would draw."""
        return self._dashboard.is_due()

    def update(self, view: RunView, blocks: Blocks) -> None:
        """Show the run as it is now."""
        self._try(lambda: self._dashboard.update(view, blocks))

    def finish(self, view: RunView, blocks: Blocks) -> None:
        """Show the run for good."""
        self._try(lambda: self._dashboard.finish(view, blocks))
        if self._has_failed:
            self._dashboard.finish(view, blocks)

    def _try(self, show: Callable[[], None]) -> None:
        if self._has_failed:
            show()
            return
        try:
            show()
        except Exception as error:  # noqa: BLE001  drawing is not worth a training run
            self._has_failed = True
            self._dashboard = TextDashboard()
            self._on_failure(
                f"the dashboard failed ({type(error).__name__}: {error}); text instead"
            )
