"""Charts in the browser: what is sent there, and what is shown when nothing draws it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pytest
from run_views import contrast, make_view

from dtkit.events import GpuUse, LogBatch, RankStarted, StepBatch
from dtkit.telemetry import RunState
from dtkit.telemetry.curves import MAX_LINES
from dtkit.views import live
from dtkit.views.live import packed
from dtkit.views.pace import Budget
from dtkit.views.panel import WidgetDashboard
from dtkit.views.words import format_metrics


def a_run(num_ranks: int, num_steps: int) -> RunState:
    state = RunState("run", range(num_ranks), start_unix_s=0.0)
    steps = np.arange(1.0, num_steps + 1)
    for rank in range(num_ranks):
        state.handle(RankStarted(rank, 100 + rank, "host", "cpu", 0.0))
        columns = {
            "step": steps.tolist(),
            "time_s": (steps / 100).tolist(),
            "loss": (1 / steps).tolist(),
            "samples": [32.0] * num_steps,
            "step_ms": [10.0 + rank] * num_steps,
            "data_ms": [1.0] * num_steps,
            "comm_ms": [2.0] * num_steps,
            "lr": [0.1] * num_steps,
            "sent_bytes": [0.0] * num_steps,
            "raw_bytes": [0.0] * num_steps,
        }
        state.handle(StepBatch(rank, columns, 0))
        state.handle(LogBatch(rank, [2], [0.02], [{"norm": float(rank)}]))
    return state


def test_every_chart_says_what_its_lines_are() -> None:
    curves = a_run(2, 40).curves()
    assert {name: list(curve.lines) for name, curve in curves.items()} == {
        "loss": ["raw", "smoothed"],
        "samples/s": ["all ranks", "slowest", "fastest"],
        "ms of a step": ["step", "data wait", "communication"],
        "ms of a step by rank": ["rank 0", "rank 1"],
        "learning rate": ["learning rate"],
        "norm": ["norm"],
    }
    assert curves["norm"].step.tolist() == [2.0]
    assert curves["norm"].lines["norm"].tolist() == [0.5]
    assert np.allclose(curves["ms of a step by rank"].lines["rank 1"], 11.0)


def test_of_many_ranks_the_telling_ones_are_drawn() -> None:
    by_rank = a_run(9, 20).curves()["ms of a step by rank"]
    assert {name: line[0] for name, line in by_rank.lines.items()} == {
        "slowest": 18.0,
        "median": 14.0,
        "fastest": 10.0,
    }


@pytest.mark.parametrize("num_ranks", [2, 9])
def test_gpus_have_charts_where_they_are_known(num_ranks: int) -> None:
    state = a_run(num_ranks, 20)
    assert not [name for name in state.curves() if "GPU" in name]
    for rank in range(num_ranks):  # each has looked at a step of its own
        state.handle(GpuUse(rank, 5 + rank % 2, 0.05, 50.0 + rank, 2**30, 2**33))
        state.handle(GpuUse(rank, 15, 0.15, 60.0 + rank, 2**31, 2**33))
    busy, memory = (state.curves()[name] for name in ("GPU busy %", "GPU memory GiB"))
    names = ["rank 0", "rank 1"] if num_ranks == 2 else ["most", "median", "least"]
    assert list(busy.lines) == list(memory.lines) == names
    assert busy.step.tolist() == [5, 6, 15]
    assert [line[-1] for line in busy.lines.values()] == (
        [60.0, 61.0] if num_ranks == 2 else [68.0, 64.0, 60.0]
    )
    assert [line[-1] for line in memory.lines.values()] == [2.0] * len(names)
    assert "busy" in format_metrics(state.view())


def test_lines_in_the_browser_are_told_apart_on_light_and_dark_and_without_colour() -> None:
    source = (Path(live.__file__).parent / "chart.js").read_text()
    (colours,) = re.findall(r"const COLOURS = \[(.*?)\];", source)
    (strokes,) = re.findall(r"const STROKES = \[(.*?)\];", source)
    for colour in re.findall(r"#\w{6}", colours):
        assert contrast(colour, "#FFFFFF") >= 3.0
        assert contrast(colour, "#111111") >= 3.0
    assert len(set(re.findall(r'"(.*?)"', strokes))) == colours.count("#") == MAX_LINES


def test_a_long_run_is_sent_in_a_few_kilobytes() -> None:
    layout, data = packed(a_run(4, 20_000).curves())
    values = np.frombuffer(data, np.float32)
    assert len(values) == sum(count * (1 + len(lines)) for _, lines, count in layout)
    assert len(data) < 50_000
    name, lines, count = layout[0]
    assert (name, lines) == ("loss", ["raw", "smoothed"])
    assert values[count - 1] == 20_000
    assert values[2 * count - 1] == pytest.approx(1 / 20_000)


def test_a_run_without_steps_has_nothing_to_draw() -> None:
    assert packed(RunState("run", range(2)).curves()) == ([], b"")


@pytest.mark.parametrize("browser", ["draws", "cannot"])
def test_a_picture_takes_the_place_of_charts_that_nobody_draws(browser: str) -> None:
    is_drawn = browser == "draws"
    now_s = [0.0]
    panel = WidgetDashboard(
        on_stop=lambda: None,
        on_pause=lambda _: None,
        curves=a_run(2, 40).curves,
        is_live=True,
        budget=Budget(lambda: now_s[0], lambda: 0.0, lambda: 0.0),
    )
    panel.start(make_view())
    (charts,) = panel._charts.children
    assert not pictures(panel)
    if is_drawn:
        charts._handle_custom_msg("drawn", [])
    now_s[0] = 10.0
    panel.update(make_view(), ())
    assert bool(pictures(panel)) is not is_drawn
    assert (charts.comm is None) is not is_drawn
    panel.finish(make_view(state="finished"), ())


def pictures(panel: WidgetDashboard) -> list[Any]:
    (part,) = panel._charts.children
    return [w for w in getattr(part, "children", ()) if isinstance(w, ipywidgets.Image) and w.value]
