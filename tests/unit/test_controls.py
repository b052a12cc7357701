"""Live controls: what they take, and how all ranks come to take it at the same step."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from run_views import make_view

import dtkit
from dtkit.driver.boundary import Boundary
from dtkit.engine.control import Control, RunStopped
from dtkit.errors import InvalidInputError
from dtkit.events import ControlDeclared, ControlsChanged, decode, encode
from dtkit.livecontrol import LR_FACTOR, LiveControl, settings
from dtkit.telemetry import ControlView, RunState
from dtkit.views.panel import WidgetDashboard
from dtkit.views.steering import moved


@pytest.mark.parametrize(
    ("control", "given", "taken"),
    [
        (LiveControl("x", 1.0), "1e-3", 1e-3),
        (LiveControl("x", 1.0), 2, 2.0),
        (LiveControl("x", 1.0, low=-1), "-0.5", -0.5),
        (LiveControl("x", 4, low=1, high=8), "8", 8),
        (LiveControl("x", 4), 5.0, 5),
        (LiveControl("x", False), "on", True),
        (LiveControl("x", True), False, False),
        (LiveControl("x", "a", choices=("a", "b")), "b", "b"),
        (LiveControl("x", 2, choices=(2, 4)), "4", 4),
    ],
)
def test_a_control_takes_its_own_kind(control: LiveControl, given: Any, taken: Any) -> None:
    found = control.checked(given)
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("control", "given", "takes"),
    [
        (LiveControl("x", 1.0), "fast", "a number"),
        (LiveControl("x", 1.0), float("nan"), "a number"),
        (LiveControl("x", 1.0, low=0), "-1", "a number from 0"),
        (LiveControl("x", 1.0), True, "a number"),
        (LiveControl("x", 4, high=8), "4.5", "a whole number to 8"),
        (LiveControl("x", 4), "9" * 5000, "a whole number"),
        (LiveControl("x", False), "maybe", "on or off"),
        (LiveControl("x", "a", choices=("a", "b")), "c", "one of a, b"),
        (LiveControl("x", 1.0), None, "a number"),
    ],
)
def test_a_bad_value_says_what_it_takes(control: LiveControl, given: Any, takes: str) -> None:
    with pytest.raises(InvalidInputError, match=f"'x': .* is not what it takes: {takes}"):
        control.checked(given)


@pytest.mark.parametrize(
    ("arguments", "rules", "says"),
    [
        (("a b", 1), {}, "letters, digits"),
        (("x", "a"), {}, "choices="),
        (("x", None), {}, "NoneType is no default"),
        (("x", 3), {"low": 4}, "a whole number from 4"),
        (("x", 3), {"low": 4, "high": 2}, "more than high"),
        (("x", True), {"low": 0}, "for numbers"),
        (("x", [1]), {}, "list is no default"),
        (("x", "c"), {"choices": ["a", "b"]}, "one of a, b"),
        (("lr_factor", 1.0), {}, "in every run"),
    ],
)
def test_a_bad_control_is_refused_outside_a_run_too(
    arguments: tuple[Any, Any], rules: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInputError, match=says):
        dtkit.control(*arguments, **rules)


def test_outside_a_run_it_is_the_default() -> None:
    assert dtkit.control("clip", 1.5, low=0.0) == 1.5
    assert dtkit.control("mode", "a", choices=["a", "b"]) == "a"


def test_settings_name_the_nearest_control() -> None:
    controls = {"clip": LiveControl("clip", 1.0), "lr_factor": LR_FACTOR}
    assert settings(controls, {"lr": "0.01", "clip": "2"}) == {"lr": 0.01, "clip": 2.0}
    with pytest.raises(InvalidInputError, match="no control 'clop'; did you mean clip"):
        settings(controls, {"clop": 1})
    with pytest.raises(InvalidInputError, match="set the same"):
        settings(controls, {"lr": 0.1, "lr_factor": 1})
    # The cell's own `lr` is the cell's.
    assert settings(controls | {"lr": LiveControl("lr", 3)}, {"lr": "4", "lr_factor": 2}) == {
        "lr": 4,
        "lr_factor": 2.0,
    }


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
        clock=lambda: now_s[0],
        cpu_clock=lambda: 0.0,
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


class Ranks:
    """Ranks as threads that make steps together, and answer as engines do.

    A rank of `mute` answers nothing, and gets what it was asked when the test lets it.
    """

    lost: tuple[int, ...] = ()

    def __init__(self, num: int, *, mute: tuple[int, ...] = ()) -> None:
        self.changed: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in range(num)]
        self.controls = [Control(self._noting(rank)) for rank in range(num)]
        self.mute = mute
        self.late: list[tuple[int, dict[str, Any]]] = []
        self._together = threading.Barrier(num)
        self.at_step = threading.Condition()
        self._threads = [threading.Thread(target=self._train, args=(r,)) for r in range(num)]
        for thread in self._threads:
            thread.start()

    def _noting(self, rank: int) -> Any:
        def note(_number: int, values: dict[str, Any]) -> None:
            self.changed[rank].append((self.controls[rank].num_steps, values))
            with self.at_step:
                self.at_step.notify_all()

        return note

    def _train(self, rank: int) -> None:
        control = self.controls[rank]
        try:
            while True:
                control.boundary()
                self._together.wait(10)  # a step is a collective
                control.stepped()
                with self.at_step:
                    self.at_step.notify_all()
        except (RunStopped, threading.BrokenBarrierError):
            self._together.abort()

    def control(
        self, operation: str, content: Any = None, *, ranks: tuple[int, ...], timeout_s: float
    ) -> dict[int, dict[str, Any]]:
        del timeout_s
        request = {"operation": operation, **(content or {})}
        self.late += [(rank, request) for rank in ranks if rank in self.mute]
        return {r: self.controls[r].answer(request) for r in ranks if r not in self.mute}

    def wait(self, is_so: Any) -> None:
        with self.at_step:
            assert self.at_step.wait_for(is_so, 10)

    def end(self) -> None:
        self.mute = ()
        for rank, request in self.late:
            self.controls[rank].answer(request)
        Boundary(self, print, is_free=False).halt((0, 1, 2), "stop")  # type: ignore[arg-type]
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


EVERYONE = (0, 1, 2)


def test_a_change_is_made_at_one_step_and_nobody_stays_held() -> None:
    ranks, notes = Ranks(3), []
    boundary = Boundary(ranks, notes.append, is_free=False)  # type: ignore[arg-type]
    for number in range(50):
        boundary.change(EVERYONE, {"x": number}, is_paused=False)
        ranks.wait(lambda n=number: all(len(found) == n + 1 for found in ranks.changed))
    ranks.end()
    assert ranks.changed[0] == ranks.changed[1] == ranks.changed[2]
    assert [values["x"] for _, values in ranks.changed[0]] == list(range(50))
    assert not notes


def test_a_paused_run_takes_a_change_and_stays_paused() -> None:
    ranks = Ranks(3)
    boundary = Boundary(ranks, print, is_free=False)  # type: ignore[arg-type]
    boundary.halt(EVERYONE, "pause")
    boundary.change(EVERYONE, {"x": 1}, is_paused=True)
    ranks.wait(lambda: all(ranks.changed))
    steps = {found[0][0] for found in ranks.changed}
    assert len(steps) == 1
    assert {control.num_steps for control in ranks.controls} == steps
    boundary.resume(EVERYONE)
    ranks.wait(lambda: ranks.controls[0].num_steps > min(steps))
    ranks.end()


def test_nothing_is_changed_while_a_rank_does_not_answer() -> None:
    ranks, notes = Ranks(3, mute=(1,)), list[str]()
    boundary = Boundary(ranks, notes.append, is_free=False)  # type: ignore[arg-type]
    boundary.change(EVERYONE, {"x": 1}, is_paused=False)
    assert notes == ["x not changed: rank 1 did not answer; try again"]
    before = ranks.controls[0].num_steps
    ranks.wait(lambda: ranks.controls[0].num_steps > before + 2)
    ranks.end()
    assert ranks.changed == [[], [], []]


def test_what_the_ranks_say_becomes_columns_and_marks() -> None:
    state = RunState("run", range(2), start_unix_s=0.0)
    events = [ControlDeclared(rank, "mode", "a", None, None, ["a", "b"]) for rank in range(2)]
    events += [ControlDeclared(0, "clip", 1, 0, None, [])]
    events += [ControlsChanged(rank, 7, 3, 0.3, {"clip": 2, "mode": "b"}) for rank in range(2)]
    for event in events:
        assert decode(encode(event)) == event
        state.handle(event)
    view = state.view()
    assert {found.control.name: found.value for found in view.controls} == {
        "lr_factor": 1.0,
        "mode": "b",
        "clip": 2,
    }
    assert [str(change) for change in view.changes] == ["clip 2, mode b from step 4 on"]


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
