"""Live controls in the panel: buttons and sliders, what they say and what they ask for."""

from __future__ import annotations

from typing import Any

import pytest
from run_views import make_view

from dtkit.livecontrol import LR_FACTOR, LiveControl
from dtkit.telemetry import ControlView
from dtkit.views.pace import Budget
from dtkit.views.panel import WidgetDashboard
from dtkit.views.steering import moved

CONTROLS = (
    ControlView(LR_FACTOR, 1.0),
    ControlView(LiveControl("mode", "a", choices=("a", "b")), "a"),
)


def a_panel(*, is_live: bool, can_click: bool = True) -> tuple[WidgetDashboard, list[Any], Any]:
    """Return a panel, what was moved in it, and what advances its clock by a second."""
    now_s, moves = [0.0], list[Any]()
    panel = WidgetDashboard(
        on_stop=lambda: None,
        on_pause=lambda _: None,
        on_control=lambda name, value: moves.append((name, value)),
        is_live=is_live,
        can_click=lambda: can_click,
        budget=Budget(lambda: now_s[0], lambda: 0.0, lambda: 0.0),
    )
    panel.start(make_view(controls=CONTROLS))

    def update(**changes: Any) -> None:
        now_s[0] += 1
        panel.update(make_view(**{"controls": CONTROLS, **changes}), ())

    return panel, moves, update


def test_buttons_move_controls_and_say_what_was_asked_for() -> None:
    panel, moves, update = a_panel(is_live=False)
    says, factor, mode = panel._steering._box.children
    down, up, text = factor.children
    assert (says.value, text.value) == ("", "<b>lr_factor</b> 1 (lr 0.0003)")
    down.click()
    down.click()
    mode.children[1].click()
    mode.children[1].click()  # there is no further one
    assert moves == [("lr_factor", 0.5), ("lr_factor", 0.25), ("mode", "b")]
    assert text.value == "<b>lr_factor</b> 1 → 0.25 after the step"
    update(controls=(ControlView(LR_FACTOR, 0.25), CONTROLS[1]), lr=7.5e-5)
    assert text.value == "<b>lr_factor</b> 0.25 (lr 7.5e-05)"
    update(state="stopping")
    assert not up.disabled
    panel.finish(make_view(state="stopped"), ())


def test_without_clicks_the_buttons_say_why() -> None:
    panel, _, _ = a_panel(is_live=False, can_click=False)
    says, factor, _mode = panel._steering._box.children
    assert factor.children[0].disabled
    assert "serves no clicks" in says.value
    assert "%dist_control works from elsewhere" in says.value
    panel.finish(make_view(state="finished"), ())


def test_sliders_tell_their_values_and_give_way_to_buttons() -> None:
    panel, moves, update = a_panel(is_live=True)
    _says, sliders = panel._steering._box.children
    assert [row["name"] for row in sliders.rows] == ["lr_factor", "mode"]
    sliders._handle_custom_msg({"name": "lr_factor", "value": 0.1}, [])
    sliders._handle_custom_msg("of no account", [])
    assert moves == [("lr_factor", 0.1)]
    for _ in range(8):  # no browser has drawn anything
        update()
    assert sliders.comm is None
    assert len(panel._steering._box.children) == 1 + len(CONTROLS)
    panel.finish(make_view(state="finished"), ())


@pytest.mark.parametrize(
    ("control", "value", "down", "up"),
    [
        (LR_FACTOR, 1.0, 0.5, 2.0),
        (LR_FACTOR, 0.0, None, 1.0),
        (LiveControl("x", 0.5, low=0, high=1), 0.5, 0.4, 0.6),
        (LiveControl("x", 0.5, low=0, high=1), 1.0, 0.9, None),
        (LiveControl("x", -3.0), -3.0, -6.0, -1.5),
        (LiveControl("x", 1), 1, 0, 2),
        (LiveControl("x", 8), 8, 4, 16),
        (LiveControl("x", 8, low=6, high=10), 8, 7, 9),
        (LiveControl("x", False), False, None, True),
        (LiveControl("x", "a", choices=("a", "b")), "a", None, "b"),
    ],
)
def test_two_buttons_reach_every_kind_of_value(
    control: LiveControl, value: Any, down: Any, up: Any
) -> None:
    assert (moved(control, value, -1), moved(control, value, 1)) == (down, up)
