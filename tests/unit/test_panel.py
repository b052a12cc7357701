"""The panel of widgets: what is displayed when, how often, and that nothing of it stays behind."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from typing import Any

import ipywidgets
import pytest
from displays import BLOCKS, WIDGET, Clock, Displayed, find, html_of, image, no_cost, widgets_of
from ipywidgets.widgets.widget import _instances
from PIL import Image
from run_views import make_empty_view, make_view

from dtkit.views.pace import Budget
from dtkit.views.panel import WidgetDashboard


def test_start_displays_widgets_that_can_be_replaced(
    dashboard: WidgetDashboard, outputs: Displayed
) -> None:
    dashboard.start(make_empty_view())
    assert len(outputs) == 1
    assert outputs[0].data[WIDGET]["model_id"] == dashboard._root.model_id
    assert outputs[0].transient["display_id"]
    assert not outputs[0].update
    assert Image.open(io.BytesIO(image(dashboard))).size == (740, 240)
    assert "○" in html_of(dashboard)


def test_finish_replaces_the_widgets_by_a_static_card(
    dashboard: WidgetDashboard, outputs: Displayed
) -> None:
    dashboard.start(make_empty_view())
    dashboard.finish(make_view(state="finished"), BLOCKS)
    assert len(outputs) == 2
    assert outputs[1].update
    assert outputs[1].transient["display_id"] == outputs[0].transient["display_id"]
    assert set(outputs[1].data) == {"text/html", "image/png", "text/plain"}
    assert "epoch &lt;1&gt;" in outputs[1].data["text/html"]
    png = base64.b64decode(outputs[1].data["image/png"])
    assert Image.open(io.BytesIO(png)).format == "PNG"


def test_finish_leaves_one_box_with_the_summary_for_a_reloaded_page(
    dashboard: WidgetDashboard,
) -> None:
    before = set(_instances)
    dashboard.start(make_empty_view(64))
    made = set(_instances) - before
    assert len(made) > 20
    comms = {model_id: _instances[model_id].comm for model_id in made}
    dashboard.finish(make_view(64, state="finished"), BLOCKS)
    left = {_instances[model_id] for model_id in set(_instances) - before}
    kinds = sorted(type(widget).__name__ for widget in left)
    assert kinds == ["HTML", "HTMLStyle", "Layout", "Layout", "VBox"]
    (summary,) = [widget for widget in left if isinstance(widget, ipywidgets.HTML)]
    assert "finished" in summary.value
    closed = [comm for model_id, comm in comms.items() if model_id not in _instances]
    assert len(closed) > 15
    assert all(comm._closed for comm in closed)


def test_a_panel_says_what_to_do_when_its_kernel_is_gone_and_a_summary_does_not(
    dashboard: WidgetDashboard,
) -> None:
    dashboard.start(make_view())
    # What shows it then is a class that front ends give to widgets without a kernel.
    assert ".jupyter-widgets-disconnected .dtkit-orphaned { display: block" in html_of(dashboard)
    assert "%dist_init --attach" in html_of(dashboard)
    assert "dtkit-panel" in dashboard._root._dom_classes
    dashboard.finish(make_view(state="finished"), ())
    assert "--attach" not in html_of(dashboard)


def test_only_the_first_finish_counts(dashboard: WidgetDashboard, outputs: Displayed) -> None:
    dashboard.start(make_empty_view())
    dashboard.finish(make_view(state="finished"), ())
    dashboard.finish(make_view(state="failed"), ())
    assert len(outputs) == 2
    assert "finished" in outputs[1].data["text/plain"]
    dashboard.update(make_view(), ())
    assert not dashboard.is_due()


def test_finish_without_start_displays_the_card(
    dashboard: WidgetDashboard, outputs: Displayed
) -> None:
    before = set(_instances)
    assert not dashboard.is_due()
    dashboard.update(make_view(), ())
    dashboard.finish(make_view(state="failed", error="no"), ())
    assert len(outputs) == 1
    assert not outputs[0].update
    assert "✖ failed" in outputs[0].data["text/plain"]
    assert set(_instances) == before


def test_an_update_draws_all_parts(dashboard: WidgetDashboard, clock: Clock) -> None:
    dashboard.start(make_empty_view())
    before = image(dashboard)
    clock.now_s += 1
    view = make_view(notes=("one", "two"))
    dashboard.update(view, BLOCKS)
    html = html_of(dashboard)
    for part in ("running", "5,055", "cuda:3", "epoch &lt;1&gt;", "<li", "0.7132"):
        assert part in html
    assert image(dashboard) != before
    (tabs,) = find(dashboard, ipywidgets.Tab)
    assert tabs.titles == ("Ranks (4)", "Logs (1)", "Notes (2)", "Controls")
    assert 'role="img" aria-label="Loss over 200 steps' in html


def test_the_tab_says_when_a_rank_is_slow(dashboard: WidgetDashboard, clock: Clock) -> None:
    dashboard.start(make_empty_view())
    clock.now_s += 1
    ranks = make_view().ranks
    slow = dataclasses.replace(ranks[2], compute_ms=99.0)
    dashboard.update(make_view(ranks=(*ranks[:2], slow, ranks[3])), ())
    assert find(dashboard, ipywidgets.Tab)[0].titles[0] == "Ranks ▲ 1 slow"


def test_text_is_drawn_four_times_a_second_and_the_chart_twice(
    dashboard: WidgetDashboard, clock: Clock
) -> None:
    dashboard.start(make_empty_view())
    states, images = [html_of(dashboard)], [image(dashboard)]
    for tick in range(1, 41):  # two seconds at 20 Hz
        clock.now_s = 100.0 + tick / 20
        dashboard.update(make_view(num_steps=tick), ())
        states.append(dashboard._state.value)
        images.append(image(dashboard))
    assert num_changes(states) == pytest.approx(8, abs=1)
    assert num_changes(images) == pytest.approx(4, abs=1)


def num_changes(values: list[Any]) -> int:
    return sum(a != b for a, b in itertools.pairwise(values))


def test_drawing_that_costs_much_rests_long(
    outputs: Displayed, clock: Clock, clicks: list[object]
) -> None:
    assert len(outputs) == 0
    # Every measurement of computing time finds 80 ms more than the last one.
    cost_s = itertools.count(step=0.08)
    dashboard = WidgetDashboard(
        on_stop=clicks.clear,
        on_pause=clicks.append,
        budget=Budget(clock, lambda: next(cost_s), no_cost),
    )
    dashboard.start(make_empty_view())
    images, states = [], []
    for tick in range(1, 201):  # ten seconds
        clock.now_s = 100.0 + tick / 20
        dashboard.update(make_view(num_steps=tick), ())
        images.append(image(dashboard))
        states.append(dashboard._state.value)
    assert num_changes(images) == 3  # 80 ms of every 2.7 s are three quarters of 4 %
    assert num_changes(states) == 1  # 80 ms are so much for a text that it rests for 5 s
    dashboard.finish(make_view(state="finished"), ())


def test_a_chart_is_not_drawn_again_when_nothing_happened(
    dashboard: WidgetDashboard, clock: Clock
) -> None:
    dashboard.start(make_empty_view())
    clock.now_s += 1
    dashboard.update(make_view(), ())
    drawn = find(dashboard, ipywidgets.Image)[0].value
    clock.now_s += 10
    dashboard.update(make_view(elapsed_s=99.0), ())
    assert find(dashboard, ipywidgets.Image)[0].value is drawn
    assert "1:39" in html_of(dashboard)


def test_unchanged_parts_send_nothing(dashboard: WidgetDashboard, clock: Clock) -> None:
    dashboard.start(make_empty_view())
    clock.now_s += 1
    dashboard.update(make_view(), BLOCKS)
    changes: list[object] = []
    for widget in widgets_of(dashboard._root):
        widget.observe(changes.append)
    clock.now_s += 1
    dashboard.update(make_view(), BLOCKS)
    assert changes == []


def test_heights_are_fixed_so_that_nothing_moves(dashboard: WidgetDashboard) -> None:
    dashboard.start(make_empty_view())
    (chart,) = find(dashboard, ipywidgets.Image)
    assert (chart.layout.width, chart.layout.height) == ("740px", "240px")
    (tabs,) = find(dashboard, ipywidgets.Tab)
    assert len({pane.layout.height for pane in tabs.children}) == 1
    assert all(pane.layout.height.endswith("px") for pane in tabs.children)
