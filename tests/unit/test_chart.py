"""The chart: what is on the picture, how large it is, and how seldom it is laid out anew."""

from __future__ import annotations

import dataclasses
import io
import math
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from run_views import make_empty_view, make_view, with_loss

from dtkit.telemetry import Curve
from dtkit.views.alt import alt_text
from dtkit.views.axis import Limits, labels, log_ticks, step_end, ticks
from dtkit.views.chart import HEIGHT_PX, WIDTH_PX, Chart
from dtkit.views.look import Look

BLUE, GREEN, ALARM = (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xB3, 0x47, 0x00)
MAX_BYTES = 40_000


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert "transparency" not in image.info
    return np.asarray(image.convert("RGB")).astype(int)


def num_pixels(png: bytes, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels(png) - np.array(colour)).max(axis=2) < 12).sum())


@pytest.mark.parametrize(("dpi", "scale"), [(100, 1), (200, 2)])
def test_the_picture_has_its_size_and_a_white_ground(dpi: int, scale: int) -> None:
    picture = pixels(Chart(dpi).render(make_view()))
    assert picture.shape == (HEIGHT_PX * scale, WIDTH_PX * scale, 3)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert picture[corner].tolist() == [255, 255, 255]


@pytest.mark.parametrize("dpi", [100, 200])
@pytest.mark.parametrize("state", ["running", "finished"])
def test_even_noise_stays_small(dpi: int, state: str) -> None:
    random = np.random.default_rng(0)
    step = np.arange(1.0, 601)
    view = make_view(state=state, step=600)
    loss, rate = (
        Curve(step, {name: random.normal(5000, 900, len(step)) for name in curve.lines})
        for curve in (view.loss_curve, view.rate_curve)
    )
    view = dataclasses.replace(view, loss_curve=loss, rate_curve=rate)
    assert len(Chart(dpi).render(view)) <= MAX_BYTES


def test_both_curves_are_drawn_only_when_there_are_numbers() -> None:
    chart = Chart()
    empty = chart.render(make_empty_view())
    assert num_pixels(empty, BLUE) == num_pixels(empty, GREEN) == 0
    full = chart.render(make_view())
    assert num_pixels(full, BLUE) > 300
    assert num_pixels(full, GREEN) > 300


def test_a_picture_does_not_depend_on_what_was_drawn_before() -> None:
    final = make_view(state="finished")
    chart = Chart()
    for num_steps in (1, 2, 50, 51, 180):
        chart.render(make_view(num_steps=num_steps), Look(log_scale=num_steps == 50))
    assert chart.render(final) == Chart().render(final)


def test_a_kept_background_shows_the_same_as_a_new_layout() -> None:
    chart = Chart()
    chart.render(make_view(num_steps=150))
    before = chart.num_layouts
    drawn_over = pixels(chart.render(make_view(num_steps=151)))
    assert chart.num_layouts == before
    chart._background = None
    assert (pixels(chart.render(make_view(num_steps=151))) == drawn_over).all()
    assert chart.num_layouts == before + 1


def test_most_updates_need_no_layout() -> None:
    chart = Chart()
    for num_steps in range(1, 400):
        chart.render(make_view(num_steps=num_steps))
    assert chart.num_layouts < 30


def test_log_scale_changes_the_loss_and_not_the_rate() -> None:
    chart = Chart()
    view = make_view()
    linear, log = pixels(chart.render(view)), pixels(chart.render(view, Look(log_scale=True)))
    middle = WIDTH_PX // 2
    assert (linear[:, :middle] != log[:, :middle]).any()
    assert (linear[:, middle + 20 :] == log[:, middle + 20 :]).all()
    assert (pixels(chart.render(view)) == linear).all()


def test_log_scale_leaves_out_what_has_no_logarithm() -> None:
    loss = np.array([1.0, -1.0, 0.0, 10.0, 0.1])
    view = with_loss(make_view(), loss, loss)
    assert num_pixels(Chart().render(view, Look(log_scale=True)), BLUE) > 0
    view = with_loss(view, -np.abs(loss), -np.abs(loss))
    assert Chart().render(view, Look(log_scale=True)) == Chart().render(view)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_said_in_the_picture(value: float) -> None:
    view = make_view()
    assert num_pixels(Chart().render(view), ALARM) == 0
    raw = view.loss_curve.lines["raw"].copy()
    raw[-5:] = value
    assert num_pixels(Chart().render(with_loss(view, raw)), ALARM) > 50


def test_single_steps_without_a_loss_are_no_alarm() -> None:
    view = make_view()
    raw = view.loss_curve.lines["raw"].copy()
    raw[1::2] = math.nan
    assert num_pixels(Chart().render(with_loss(view, raw)), ALARM) == 0


def test_one_spike_does_not_flatten_the_curve() -> None:
    view = make_view()
    raw = view.loss_curve.lines["raw"].copy()
    raw[100] = 1e6
    chart = Chart()
    chart.render(with_loss(view, raw))
    assert chart._plots[0]._axes.get_ylim()[1] < 10


def test_the_users_own_style_does_not_reach_the_chart() -> None:
    view = make_view()
    expected = Chart().render(view)
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30, "xtick.labelsize": 30}):
        assert Chart().render(view) == expected
    chart = Chart()
    with mpl.rc_context({"font.sans-serif": ["DejaVu Serif"]}):
        assert chart.render(view) == expected
    with mpl.rc_context({"font.size": 30}):
        chart.render(view)
        assert mpl.rcParams["font.size"] == 30


def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys; from run_views import make_view; from dtkit.views.chart import Chart; "
        "from dtkit.views.look import Look; Chart().render(make_view(), Look(log_scale=True)); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_alt_text_has_the_numbers() -> None:
    text = alt_text(with_loss(make_view(best_loss=0.25), np.ones(2), np.array([3.0, 0.5])))
    assert "from 3.000 to 0.5000, best 0.2500" in text
    assert "200 steps" in text
    assert "between" in text
    assert alt_text(make_empty_view()) == "Loss: not known yet. Samples/s: not known yet."


def test_limits_hold_while_the_data_fit() -> None:
    limits = Limits()
    assert limits.fit(1.0, 3.0, floor=0.0, is_tight=False)
    before = (limits.low, limits.high)
    assert before[0] < 1.0
    assert before[1] > 3.0
    assert not limits.fit(1.1, 2.9, floor=0.0, is_tight=False)
    assert (limits.low, limits.high) == before


def test_limits_grow_with_room_to_spare_and_shrink_when_mostly_empty() -> None:
    limits = Limits(0.0, 10.0)
    assert limits.fit(0.0, 12.0, floor=0.0, is_tight=False)
    assert limits.high == pytest.approx(15.0)
    assert limits.low == 0.0
    assert limits.fit(0.0, 2.0, floor=0.0, is_tight=False)
    assert limits.high < 3.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (5.0, 5.0), (-2.0, -2.0)])
def test_limits_of_a_constant_are_not_empty(low: float, high: float) -> None:
    limits = Limits()
    limits.fit(low, high, floor=-math.inf, is_tight=True)
    assert limits.low < low <= high < limits.high


@pytest.mark.parametrize(
    ("step", "total_steps", "end"),
    [(0, None, 20), (20, None, 20), (21, None, 30), (101, None, 200), (999, None, 1000),
     (21, 25, 25), (30, 25, 30)],
)  # fmt: skip
def test_the_step_axis_ends_at_the_next_round_number(
    step: int, total_steps: int | None, end: float
) -> None:
    assert step_end(step, total_steps, is_over=False) == end


@pytest.mark.parametrize(("step", "end"), [(0, 1), (73, 73)])
def test_the_step_axis_ends_with_the_run(step: int, end: float) -> None:
    assert step_end(step, 400, is_over=True) == end


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([2.0, 2.25, 2.5], ["2.00", "2.25", "2.50"]),
        ([0.0, 2000.0, 4000.0], ["0", "2,000", "4,000"]),
        ([0.0, 20_000.0, 40_000.0], ["0", "20k", "40k"]),
        ([0.0, 5e5, 1e6], ["0", "0.5M", "1.0M"]),
        ([0.0, 1e-5, 2e-5], ["0", "1e-05", "2e-05"]),
        ([0.1, 1.0, 10.0], ["0.1", "1", "10"]),
        ([7.0], ["7"]),
        ([], []),
    ],
)
def test_ticks_are_short_text(values: list[float], expected: list[str]) -> None:
    assert labels(values) == expected


@pytest.mark.parametrize("bounds", [(-0.1, 0.1), (-1.0, 0.3), (-3.0, 2.0), (-12.0, 12.0)])
def test_log_ticks_show_a_scale(bounds: tuple[float, float]) -> None:
    values = log_ticks(*bounds)
    assert 3 <= len(values) <= 8
    assert values == sorted(values)
    assert all(bounds[0] - 1e-9 <= math.log10(v) <= bounds[1] + 1e-9 for v in values)


def test_ticks_lie_inside_their_limits() -> None:
    assert ticks(0, 20, 5, is_integer=True) == [0, 5, 10, 15, 20]
    assert all(0.31 <= t <= 0.39 for t in ticks(0.31, 0.39, 4))
