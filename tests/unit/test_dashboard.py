"""Dashboards without widgets, at what pace they draw, and which kind is chosen."""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from displays import BLOCKS, WIDGET, Clock, Displayed, no_cost
from IPython.core.interactiveshell import InteractiveShell
from run_views import make_empty_view, make_view, with_loss

from dtkit.errors import InvalidInputError
from dtkit.output import OutputBlock
from dtkit.views.dashboard import HtmlDashboard, WidgetDashboard, make_dashboard
from dtkit.views.pace import Budget, Pace
from dtkit.views.terminal import NullDashboard, TextDashboard

if TYPE_CHECKING:
    from dtkit.views.dashboard import Dashboard


class Terminal(io.StringIO):
    """A stream on which a line can be written again."""

    def isatty(self) -> bool:
        """Return True."""
        return True


# HTML.


def test_html_is_displayed_once_and_then_replaced(outputs: Displayed, clock: Clock) -> None:
    dashboard = HtmlDashboard(Budget(clock, no_cost, no_cost))
    dashboard.start(make_empty_view())
    for tick in range(1, 61):  # three seconds at 20 Hz
        clock.now_s = 100.0 + tick / 20
        dashboard.update(make_view(num_steps=tick), BLOCKS)
    dashboard.finish(make_view(state="stopped"), BLOCKS)
    dashboard.finish(make_view(state="stopped"), BLOCKS)
    assert not dashboard.is_due()
    assert [output.update for output in outputs] == [False, True, True, True, True]
    assert len({output.transient["display_id"] for output in outputs}) == 1
    assert "epoch &lt;1&gt;" in outputs[1].data["text/html"]
    assert "image/png" in outputs[-1].data
    assert not any(WIDGET in output.data for output in outputs)


def test_html_finishes_without_a_start(outputs: Displayed, clock: Clock) -> None:
    dashboard = HtmlDashboard(Budget(clock))
    assert not dashboard.is_due()
    dashboard.update(make_view(), ())
    dashboard.finish(make_view(state="finished"), ())
    assert [output.update for output in outputs] == [False]


# Text.


def test_text_goes_out_line_by_line_at_a_slow_pace(clock: Clock) -> None:
    stream = io.StringIO()
    dashboard = TextDashboard(stream, Budget(clock, no_cost, no_cost))
    dashboard.start(make_empty_view())
    for tick in range(1, 240):  # twelve seconds at 20 Hz
        clock.now_s = 100.0 + tick / 20
        dashboard.update(make_view(num_steps=tick), ())
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("○ starting")
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_that_is_written_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    dashboard = TextDashboard(stream, Budget(clock, no_cost, no_cost))
    dashboard.start(make_empty_view())
    for tick in range(1, 61):
        clock.now_s = 100.0 + tick / 20
        dashboard.update(make_view(num_steps=tick), ())
    live = stream.getvalue()
    assert "\n" not in live
    assert len(re.findall("running", live)) == 2 * 3  # once to clear, once to write
    assert max(map(len, live.split("\r"))) < 50
    dashboard.finish(make_view(state="finished"), BLOCKS)
    end = stream.getvalue().removeprefix(live)
    assert re.match(r"\r +\r✔ finished", end)
    assert end.endswith("epoch <1>\n")


def test_text_ends_with_all_that_was_printed_and_only_once(clock: Clock) -> None:
    stream = io.StringIO()
    dashboard = TextDashboard(stream, Budget(clock))
    blocks = (OutputBlock((0,), "x" * 9_000), OutputBlock((1,), "y" * 9_000))
    dashboard.finish(make_view(2, state="finished"), blocks)
    dashboard.finish(make_view(2, state="finished"), blocks)
    assert "x" * 9_000 in stream.getvalue()
    assert "y" * 9_000 in stream.getvalue()
    assert stream.getvalue().count("✔ finished") == 1
    assert not dashboard.is_due()


def test_the_same_line_is_not_written_twice(clock: Clock) -> None:
    stream = io.StringIO()
    dashboard = TextDashboard(stream, Budget(clock, no_cost, no_cost))
    dashboard.start(make_view())
    clock.now_s += 60
    dashboard.update(make_view(), ())
    assert len(stream.getvalue().splitlines()) == 1


# Pace, and the choice of a dashboard.


def test_a_pace_rests_as_long_as_its_part_asks(clock: Clock) -> None:
    cost_s = itertools.count(step=0.04)
    pace = Pace(0.5, Budget(clock, lambda: next(cost_s), no_cost), 0.5)
    assert pace.is_due()
    pace.run(lambda: None)  # 40 ms of 2 s are half of 4 %
    clock.now_s += 1.9
    assert not pace.is_due()
    clock.now_s += 0.2
    assert pace.is_due()


def test_drawing_gets_what_the_rest_of_the_process_leaves(clock: Clock) -> None:
    process = Clock()
    thread_s = itertools.count()  # every drawing takes a second, for ease of reckoning
    budget = Budget(clock, lambda: next(thread_s), process)
    process.now_s += 0.5  # what is loaded at the start does not count
    budget.begin()
    budget.spend(lambda: None)
    clock.now_s += 100
    process.now_s += 1 + 2.5
    assert budget.left() == pytest.approx(0.04 - 0.025)
    clock.now_s += 100
    process.now_s += 50
    assert budget.left() == pytest.approx(0.01)  # half a core is read: still something is seen
    clock.now_s += 0.1
    assert budget.left() == pytest.approx(0.01)
    clock.now_s += 10
    assert budget.left() == pytest.approx(0.04)


def test_a_pace_keeps_its_interval_and_can_hurry(clock: Clock) -> None:
    pace = Pace(0.5, Budget(clock, no_cost, no_cost))
    pace.run(lambda: None)
    clock.now_s += 0.4
    assert not pace.is_due()
    pace.hurry()
    assert pace.is_due()


def test_a_pace_never_rests_for_long(clock: Clock) -> None:
    cost_s = itertools.count(step=60)
    pace = Pace(0.5, Budget(clock, lambda: next(cost_s), no_cost))
    pace.run(lambda: None)
    clock.now_s += 5.1
    assert pace.is_due()


def make(ui: str) -> Dashboard:
    return make_dashboard(on_stop=lambda: None, on_pause=lambda _: None, ui=ui)


KINDS = {
    "widgets": WidgetDashboard,
    "html": HtmlDashboard,
    "text": TextDashboard,
    "off": NullDashboard,
}


@pytest.mark.parametrize(("ui", "kind"), KINDS.items())
def test_every_ui_has_its_dashboard(ui: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make(ui)) is kind
    monkeypatch.setenv("DTKIT_UI", ui)
    assert type(make("auto")) is kind
    assert type(make("off")) is NullDashboard


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_an_unknown_ui_lists_the_known_ones(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "environment":
        monkeypatch.setenv("DTKIT_UI", "tui")
    with pytest.raises(InvalidInputError, match=r"'tui'.*auto, live, widgets, html, text, off"):
        make("tui" if where == "argument" else "auto")


def test_auto_takes_widgets_in_a_kernel_and_text_elsewhere(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DTKIT_UI", raising=False)
    assert type(make("auto")) is TextDashboard
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    assert type(make("auto")) is WidgetDashboard


def test_auto_takes_text_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTKIT_UI", raising=False)
    assert not InteractiveShell.initialized()
    assert type(make("auto")) is TextDashboard


def test_off_shows_nothing(outputs: Displayed, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = make("off")
    dashboard.start(make_view())
    dashboard.update(make_view(), ())
    dashboard.finish(with_loss(make_view(), np.ones(200)), ())
    assert not dashboard.is_due()
    assert len(outputs) == 0
    assert capsys.readouterr().out == ""
