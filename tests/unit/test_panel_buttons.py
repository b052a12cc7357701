"""The panel's buttons: what they say in each state, and what a click does."""

from __future__ import annotations

import re
import threading

import ipywidgets
import pytest
from displays import Clock, Displayed, button, find, html_of, image
from run_views import make_empty_view, make_view

from dtkit.views.controls import CANNOT_CLICK
from dtkit.views.pace import Budget
from dtkit.views.panel import WidgetDashboard


@pytest.mark.parametrize(
    ("state", "pause", "stop"),
    [
        ("starting", "Pause (off)", "Stop"),
        ("running", "Pause", "Stop"),
        ("pausing", "Pausing… (off)", "Stop"),
        ("paused", "Resume", "Stop"),
        ("stopping", "Pause (off)", "Stopping… (off)"),
        ("finished", "Pause (off)", "Stop (off)"),
    ],
)
def test_buttons_fit_the_state(
    dashboard: WidgetDashboard, state: str, pause: str, stop: str
) -> None:
    dashboard.start(make_view(state=state))
    buttons = find(dashboard, ipywidgets.Button)
    said = [b.description + (" (off)" if b.disabled else "") for b in buttons]
    assert said[:2] == [pause, stop]


def test_stop_is_said_at_once_and_stays_so(
    dashboard: WidgetDashboard, clock: Clock, clicks: list[object]
) -> None:
    dashboard.start(make_view())
    stop = button(dashboard, "Stop")
    stop.click()
    assert clicks == ["stop"]
    assert stop.description == "Stopping…"
    assert stop.disabled
    for state in ("running", "stopping"):
        clock.now_s += 1
        dashboard.update(make_view(state=state), ())
        assert stop.description == "Stopping…"
        assert button(dashboard, "Pause").disabled


def test_pause_waits_for_its_effect_and_becomes_resume(
    dashboard: WidgetDashboard, clock: Clock, clicks: list[object]
) -> None:
    dashboard.start(make_view())
    pause = button(dashboard, "Pause")
    seen = []
    for state in ("running", "pausing", "paused"):
        if state == "running":
            pause.click()
        clock.now_s += 1
        dashboard.update(make_view(state=state), ())
        seen.append((pause.description, pause.disabled))
    assert seen == [("Pausing…", True), ("Pausing…", True), ("Resume", False)]
    pause.click()
    assert (pause.description, pause.disabled) == ("Resuming…", True)
    clock.now_s += 1
    dashboard.update(make_view(), ())
    assert (pause.description, pause.disabled) == ("Pause", False)
    assert clicks == [True, False]


def test_a_click_may_come_from_another_thread(
    dashboard: WidgetDashboard, clicks: list[object]
) -> None:
    dashboard.start(make_view())
    thread = threading.Thread(target=button(dashboard, "Stop").click)
    thread.start()
    thread.join()
    assert clicks == ["stop"]


def test_the_log_scale_is_switched_at_once_and_kept_in_the_summary(
    dashboard: WidgetDashboard, clock: Clock, outputs: Displayed
) -> None:
    dashboard.start(make_empty_view())
    clock.now_s += 1
    view = make_view()
    dashboard.update(view, ())
    linear = image(dashboard)
    assert not dashboard.is_due()
    button(dashboard, "log scale").click()
    assert button(dashboard, "log scale").description == "☑ log scale"
    assert dashboard.is_due()
    dashboard.update(view, ())
    assert image(dashboard) != linear
    final = make_view(state="finished")
    dashboard.finish(final, ())
    shown = outputs[-1].data["image/png"]
    other = WidgetDashboard(on_stop=lambda: None, on_pause=lambda _: None)
    other.finish(final, ())
    assert outputs[-1].data["image/png"] != shown


def test_many_ranks_are_shown_all_when_asked(dashboard: WidgetDashboard, clock: Clock) -> None:
    dashboard.start(make_view(64))
    assert len(re.findall("cuda:", html_of(dashboard))) == 3
    button(dashboard, "all 64 ranks").click()
    clock.now_s += 0.01
    dashboard.update(make_view(64), ())
    assert len(re.findall("cuda:", html_of(dashboard))) == 64


@pytest.mark.parametrize(("num_ranks", "display"), [(8, "none"), (9, None)])
def test_few_ranks_have_no_switch(
    dashboard: WidgetDashboard, num_ranks: int, display: str | None
) -> None:
    dashboard.start(make_view(num_ranks))
    assert button(dashboard, f"all {num_ranks} ranks").layout.display == display


def test_without_clicks_every_button_says_what_to_press(outputs: Displayed, clock: Clock) -> None:
    assert len(outputs) == 0
    dashboard = WidgetDashboard(
        on_stop=lambda: None,
        on_pause=lambda _: None,
        can_click=lambda: False,
        budget=Budget(clock),
    )
    dashboard.start(make_view(12))
    buttons = find(dashboard, ipywidgets.Button)
    assert len(buttons) == 10
    assert all(b.disabled and b.tooltip == CANNOT_CLICK for b in buttons)
    dashboard.finish(make_view(state="stopped"), ())
