"""The charts as a picture: what its buttons choose, what is drawn then, and what is said of it."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from run_views import contrast, make_view

from dtkit.telemetry import Curve
from dtkit.telemetry.view import ControlChange
from dtkit.views import live as in_browser
from dtkit.views.axis import step_range
from dtkit.views.chart import Chart
from dtkit.views.controls import CANNOT_CLICK
from dtkit.views.look import COLOURS, DASHES, Look, curves_in, rows_of
from dtkit.views.picture import PictureChart

if TYPE_CHECKING:
    from dtkit.telemetry import RunView

STEP = np.arange(1.0, 201)
ORANGE, GREEN = (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)


def curves_of(view: RunView) -> dict[str, Curve]:
    """Return what `RunState.curves` would, for the view and two metrics."""
    return {
        **curves_in(view),
        "ms of a step by rank": Curve(STEP, {f"rank {i}": 10.0 + i + 0 * STEP for i in range(7)}),
        "accuracy": Curve(STEP, {"accuracy": STEP / 200}),
    }


class Shown:
    """A picture with its buttons, drawn whenever one is pressed."""

    def __init__(self, *, can_click: bool = True) -> None:
        self.view = make_view()
        self.num_switches = 0
        self.chart = PictureChart(
            lambda: curves_of(self.view), self._count, can_click=lambda: can_click
        )
        box = self.chart.build()
        self.bar, self.image, self.alt = box.children
        self.chart.draw(self.view)

    def _count(self) -> None:
        self.num_switches += 1

    def buttons(self) -> list[Any]:
        return [part for part in self.bar.children if hasattr(part, "click")]

    def press(self, words: str) -> bytes:
        next(b for b in self.buttons() if words in f"{b.description} {b.tooltip}").click()
        self.chart.draw(self.view)
        return bytes(self.image.value)

    def said(self) -> list[str]:
        return [re.sub("<.*?>", "", p.value) for p in self.bar.children if hasattr(p, "value")]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def num_pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture - np.array(colour)).max(axis=2) < 12).sum())


def test_each_side_goes_through_all_charts_and_back() -> None:
    shown = Shown()
    assert shown.said() == ["1 of 4", "2 of 4"]
    first = bytes(shown.image.value)
    other = shown.press("right chart: the one after")
    assert shown.chart.look.names == ("loss", "ms of a step by rank")
    left, before = pixels(other)[:, :360], pixels(first)[:, :360]
    assert np.abs(left - before).max() < 60  # from another palette, and else the same
    assert "Ms of a step by rank over 200 steps: rank 0 from 10 to 10" in shown.alt.value
    assert num_pixels(pixels(other), ORANGE) > 20
    for _ in range(3):
        shown.press("right chart: the one after")
    assert shown.said() == ["1 of 4", "2 of 4"]
    assert bytes(shown.image.value) == first
    shown.press("left chart: the one before")
    assert shown.said() == ["4 of 4", "2 of 4"]
    assert shown.num_switches == 5


def test_smoothing_adds_a_line_and_zoom_leaves_old_steps_out() -> None:
    shown = Shown()
    assert num_pixels(pixels(shown.image.value), ORANGE) == 0
    assert num_pixels(pixels(shown.press("smooth: off")), ORANGE) > 100
    for words in ("smooth: 0.8", "smooth: 0.9", "smooth: 0.98"):
        picture = shown.press(words)
    assert num_pixels(pixels(picture), ORANGE) == 0
    shown.press("steps: all")
    left = shown.chart._chart._plots[0]._axes
    assert left.get_xlim() == (100, 210)
    assert left.get_ylim()[1] < 1.5  # of the steps that are seen
    shown.press("steps: last half")
    assert left.get_xlim()[0] == 180
    shown.press("steps: last tenth")
    assert left.get_xlim()[0] == 0


def test_a_chart_that_is_gone_gives_way_to_what_stood_there_first() -> None:
    view = make_view()
    gone = Chart().render(view, Look(names=("no such", "nor this")))
    assert gone == Chart().render(view)


def test_without_clicks_the_buttons_say_why() -> None:
    shown = Shown(can_click=False)
    assert len(shown.buttons()) == 7
    assert all(b.disabled and b.tooltip == CANNOT_CLICK for b in shown.buttons())


@pytest.mark.parametrize("name", ["ms of a step by rank", "accuracy"])
@pytest.mark.parametrize("how", [{"log_scale": True}, {"part": 0.1}, {"smoothing": 0.8}])
def test_every_look_is_the_same_whatever_was_drawn_before(name: str, how: Any) -> None:
    view = make_view(state="finished")
    look = Look(("loss", name), **how)
    chart = Chart()
    for other in (Look(), Look(("accuracy", "loss"), smoothing=0.99), Look(part=0.5)):
        chart.render(make_view(num_steps=150), other, curves_of(view))
    picture = chart.render(view, look, curves_of(view))
    assert picture == Chart().render(view, look, curves_of(view))


def test_changes_by_hand_are_marked_with_words_that_do_not_overlap() -> None:
    steps = (20, 21, 22, 23, 120, 199)
    changes = tuple(ControlChange(s, s / 10, {"lr_factor": s / 100}) for s in steps)
    chart = Chart()
    chart.render(dataclasses.replace(make_view(state="finished"), changes=changes))
    for plot in chart._plots:
        boxes = [t.get_window_extent() for t in plot._texts if t.get_visible()]
        assert len(boxes) == 5  # a fourth beside three has no room; its line is there
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(plot._axes.bbox.x0 <= box.x0 <= box.x1 <= plot._axes.bbox.x1 for box in boxes)


@pytest.mark.parametrize(
    ("spans", "rows"),
    [
        ([], []),
        ([(0, 10), (10, 20)], [0, 0]),
        ([(0, 10), (5, 15), (9, 12), (9.5, 11), (13, 20)], [0, 1, 2, None, 0]),
    ],
)
def test_texts_go_to_the_first_row_with_room(
    spans: list[tuple[float, float]], rows: list[int | None]
) -> None:
    assert rows_of(spans) == rows


@pytest.mark.parametrize(
    ("step", "part", "live", "over"),
    [
        (200, 1.0, (0, 200), (0, 200)),
        (200, 0.5, (100, 210), (100, 200)),
        (12_345, 0.1, (11_100, 12_400), (11_100, 12_345)),
        (1, 0.1, (0, 2), (0, 1)),
        (0, 0.5, (0, 1), (0, 1)),
    ],
)
def test_a_part_of_the_steps_has_round_ends(
    step: int, part: float, live: tuple[float, float], over: tuple[float, float]
) -> None:
    assert step_range(step, 400, part, is_over=False) == live
    assert step_range(step, 400, part, is_over=True) == over


def test_lines_are_told_apart_as_in_the_browser() -> None:
    source = (Path(in_browser.__file__).parent / "chart.js").read_text()
    (colours,) = re.findall(r"const COLOURS = \[(.*?)\];", source)
    (dashes,) = re.findall(r"const DASHES = \[(.*)\];", source)
    assert tuple(re.findall(r"#\w{6}", colours)) == COLOURS
    found = [tuple(map(int, re.findall(r"\d+", dash))) for dash in re.findall(r"\[(.*?)\]", dashes)]
    assert tuple(found) == DASHES
    assert all(contrast(colour, "#FFFFFF") >= 3.0 for colour in COLOURS)
