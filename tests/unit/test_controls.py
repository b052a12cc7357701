"""Live controls: what they take, and how all ranks come to take it at the same step."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest

import dtkit
from dtkit.driver.boundary import Boundary
from dtkit.engine.control import Control, RunStopped
from dtkit.errors import InvalidInputError
from dtkit.events import ControlDeclared, ControlsChanged, decode, encode
from dtkit.livecontrol import LR_FACTOR, LiveControl, settings
from dtkit.telemetry import RunState


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
        # A rank that waits for one that has stopped waits in vain, and is seen not to end.
        with contextlib.suppress(RunStopped, threading.BrokenBarrierError):
            while True:
                control.boundary()
                self._together.wait(10)  # a step is a collective
                control.stepped()
                with self.at_step:
                    self.at_step.notify_all()

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


def test_nobody_stops_while_a_rank_does_not_say_where_it_is() -> None:
    ranks = Ranks(3)
    boundary = Boundary(ranks, print, is_free=False)  # type: ignore[arg-type]
    # Rank 1 is past a boundary at which the others are held when they hear of the stop.
    ranks.controls[1].answer({"operation": "hold"})
    ranks.wait(lambda: ranks.controls[1].num_steps)
    ranks.mute = (1,)
    assert not boundary.halt(EVERYONE, "stop")
    assert not boundary.halt(EVERYONE, "stop")
    assert all(thread.is_alive() for thread in ranks._threads)
    ranks.mute = ()
    for rank, request in ranks.late:
        ranks.controls[rank].answer(request)
    assert boundary.halt(EVERYONE, "stop")
    for thread in ranks._threads:
        thread.join(10)
    assert len({control.num_steps for control in ranks.controls}) == 1


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
