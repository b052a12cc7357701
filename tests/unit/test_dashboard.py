"""Dashboards: what is displayed when, how often, and that nothing of it stays behind."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import CapturedIO, RichOutput, capture_output
from ipywidgets.widgets.widget import _instances
from PIL import Image
from run_views import make_empty_view, make_view
from traitlets.config import Config

from dtkit.errors import InvalidInputError
from dtkit.output import OutputBlock
from dtkit.views.controls import CANNOT_CLICK
from dtkit.views.dashboard import HtmlDashboard, WidgetDashboard, make_dashboard
from dtkit.views.terminal import NullDashboard, Pace, TextDashboard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.views.dashboard import Dashboard

WIDGET = "application/vnd.jupyter.widget-view+json"
BLOCKS = (OutputBlock((0, 1, 2, 3), "epoch <1>\n"),)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


def no_cost() -> float:
    return 0.0


class Terminal(io.StringIO):
    """A stream on which a line can be written again."""

    def isatty(self) -> bool:
        """Return True."""
        return True


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


class Displayed(Sequence[RichOutput]):
    """What was displayed so far, in order; replacements have `update`."""

    def __init__(self, captured: CapturedIO) -> None:
        self._captured = captured

    def __getitem__(self, index: Any) -> Any:
        return self._captured.outputs[index]

    def __len__(self) -> int:
        return len(self._captured.outputs)


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
        clock=clock,
        cpu_clock=no_cost,
    )
    yield dashboard
    dashboard.finish(make_view(state="finished"), ())


def widgets_of(root: Any) -> Iterator[Any]:
    yield root
    for child in getattr(root, "children", ()):
        yield from widgets_of(child)


def find(dashboard: WidgetDashboard, kind: type) -> list[Any]:
    return [widget for widget in widgets_of(dashboard._root) if isinstance(widget, kind)]


def button(dashboard: WidgetDashboard, name: str) -> Any:
    return next(b for b in find(dashboard, ipywidgets.Button) if name in b.description)


def html_of(dashboard: WidgetDashboard) -> str:
    return "".join(widget.value for widget in find(dashboard, ipywidgets.HTML))


def image(dashboard: WidgetDashboard) -> bytes:
    (widget,) = find(dashboard, ipywidgets.Image)
    return bytes(widget.value)


# Widgets.


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
        states.append(find(dashboard, ipywidgets.HTML)[0].value)
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
        on_stop=clicks.clear, on_pause=clicks.append, clock=clock, cpu_clock=lambda: next(cost_s)
    )
    dashboard.start(make_empty_view())
    images, states = [], []
    for tick in range(1, 201):  # ten seconds
        clock.now_s = 100.0 + tick / 20
        dashboard.update(make_view(num_steps=tick), ())
        images.append(image(dashboard))
        states.append(find(dashboard, ipywidgets.HTML)[0].value)
    assert num_changes(images) == 3  # 80 ms of every 2.7 s are 3 %
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
        on_stop=lambda: None, on_pause=lambda _: None, can_click=lambda: False, clock=clock
    )
    dashboard.start(make_view(12))
    buttons = find(dashboard, ipywidgets.Button)
    assert len(buttons) == 10
    assert all(b.disabled and b.tooltip == CANNOT_CLICK for b in buttons)
    dashboard.finish(make_view(state="stopped"), ())


# HTML.


def test_html_is_displayed_once_and_then_replaced(outputs: Displayed, clock: Clock) -> None:
    dashboard = HtmlDashboard(clock=clock, cpu_clock=no_cost)
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
    dashboard = HtmlDashboard(clock=clock)
    assert not dashboard.is_due()
    dashboard.update(make_view(), ())
    dashboard.finish(make_view(state="finished"), ())
    assert [output.update for output in outputs] == [False]


# Text.


def test_text_goes_out_line_by_line_at_a_slow_pace(clock: Clock) -> None:
    stream = io.StringIO()
    dashboard = TextDashboard(stream, clock=clock, cpu_clock=no_cost)
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
    dashboard = TextDashboard(stream, clock=clock, cpu_clock=no_cost)
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
    dashboard = TextDashboard(stream, clock=clock)
    blocks = (OutputBlock((0,), "x" * 9_000), OutputBlock((1,), "y" * 9_000))
    dashboard.finish(make_view(2, state="finished"), blocks)
    dashboard.finish(make_view(2, state="finished"), blocks)
    assert "x" * 9_000 in stream.getvalue()
    assert "y" * 9_000 in stream.getvalue()
    assert stream.getvalue().count("✔ finished") == 1
    assert not dashboard.is_due()


def test_the_same_line_is_not_written_twice(clock: Clock) -> None:
    stream = io.StringIO()
    dashboard = TextDashboard(stream, clock=clock, cpu_clock=no_cost)
    dashboard.start(make_view())
    clock.now_s += 60
    dashboard.update(make_view(), ())
    assert len(stream.getvalue().splitlines()) == 1


# Pace, and the choice of a dashboard.


def test_a_pace_rests_as_long_as_its_share_asks(clock: Clock) -> None:
    cost_s = itertools.count(step=0.1)
    pace = Pace(0.5, clock, lambda: next(cost_s), 0.05)
    assert pace.is_due()
    pace.run(lambda: None)  # 0.1 s of 2 s are 5 %
    clock.now_s += 1.9
    assert not pace.is_due()
    clock.now_s += 0.2
    assert pace.is_due()


def test_a_pace_keeps_its_interval_and_can_hurry(clock: Clock) -> None:
    pace = Pace(0.5, clock, no_cost)
    pace.run(lambda: None)
    clock.now_s += 0.4
    assert not pace.is_due()
    pace.hurry()
    assert pace.is_due()


def test_a_pace_never_rests_for_long(clock: Clock) -> None:
    cost_s = itertools.count(step=60)
    pace = Pace(0.5, clock, lambda: next(cost_s))
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
    dashboard.finish(make_view(loss_raw=np.ones(200)), ())
    assert not dashboard.is_due()
    assert len(outputs) == 0
    assert capsys.readouterr().out == ""
