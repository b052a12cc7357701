"""A shell without a kernel, what is displayed in it, and time that passes when told to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from displays import Clock, Displayed, no_cost
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from run_views import make_view
from traitlets.config import Config

from dtkit.views.pace import Budget
from dtkit.views.panel import WidgetDashboard

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """A real IPython shell without a kernel and without a history file."""
    assert not InteractiveShell.initialized()
    config = Config()
    config.HistoryManager.enabled = False
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


@pytest.fixture
def outputs(shell: InteractiveShell) -> Iterator[Displayed]:
    assert shell is InteractiveShell.instance()
    with capture_output() as captured:
        yield Displayed(captured)


@pytest.fixture
def clicks() -> list[object]:
    return []


@pytest.fixture
def dashboard(outputs: Displayed, clicks: list[object], clock: Clock) -> Iterator[WidgetDashboard]:
    assert len(outputs) == 0
    dashboard = WidgetDashboard(
        on_stop=lambda: clicks.append("stop"),
        on_pause=clicks.append,
        budget=Budget(clock, no_cost, no_cost),
    )
    yield dashboard
    dashboard.finish(make_view(state="finished"), ())
