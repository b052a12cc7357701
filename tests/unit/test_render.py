"""A run as HTML and as text: what is said, that it is safe, and that it can be read."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from run_views import contrast, make_empty_view, make_rank, make_view

from dtkit import _text
from dtkit.events import RankStarted, StepBatch, Total
from dtkit.output import OutputBlock
from dtkit.telemetry import RunState, RunView
from dtkit.views import chart, render
from dtkit.views.alt import alt_text
from dtkit.views.summary import card, summary_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

STATES = {
    "starting": "○ starting",
    "running": "● running",
    "pausing": "❚❚ pausing",
    "paused": "❚❚ paused",
    "stopping": "■ stopping",
    "stopped": "■ stopped",
    "finished": "✔ finished",
    "failed": "✖ failed",
}
BLOCKS = (OutputBlock((0,), "epoch 1\nsaved\n"), OutputBlock((1, 2, 3), "epoch 1\n"))
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = ("img",)
TAGS = {
    "b", "details", "div", "img", "li", "pre", "span", "summary", "table", "tbody", "td", "th",
    "thead", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {"alt", "aria-label", "aria-valuenow", "open", "role", "scope", "src", "style",
              "title", "width"}  # fmt: skip


class Document(HTMLParser):
    """Well-formed HTML: its text, and every tag and attribute in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        """All text, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag and its attributes."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes the innermost open tag."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note the text."""
        self.words.append(data)

    def of(self, name: str) -> list[str]:
        """Return the values of an attribute, wherever it occurs."""
        return [value for attribute, value in self.attributes if attribute == name]


def rows_of(html: str) -> list[list[str]]:
    """Return the text of a table's body, row by row."""
    body = html[html.index("<tbody>") :]
    return [
        [Document(cell).text for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr.*?</tr>", body)
    ]


def every_html(view: RunView, blocks: tuple[OutputBlock, ...] = BLOCKS) -> str:
    png = b"not looked at"
    return "".join([
        card(view, blocks, png),
        render.ranks_table(view, is_full=True),
        render.notes_list(view),
        render.log_blocks(blocks, 4, max_chars=1000, is_live=True),
        render.log_blocks(blocks, 4, max_chars=1000, is_live=False),
    ])  # fmt: skip


def every_view() -> list[RunView]:
    slow = (*make_view().ranks[:3], make_rank(3, compute_ms=90.0, state="lost"))
    return [
        *(make_view(state=state) for state in STATES),
        *(make_view(num_ranks) for num_ranks in (1, 2, 9, 64)),
        make_view(ranks=slow, best_loss=0.1, state="failed", error="rank 3 is gone"),
        make_view(loss_raw=np.full(200, math.nan)),
        make_view(loss_raw=np.append(np.ones(195), np.full(5, math.nan))),
        make_empty_view(1),
        make_empty_view(9),
    ]


@pytest.mark.parametrize(("state", "expected"), STATES.items())
def test_a_state_is_a_sign_and_a_word(state: str, expected: str) -> None:
    view = make_view(state=state)
    assert Document(render.state_line(view)).text.startswith(expected)
    assert _text.text_line(view).startswith(expected)
    assert _text.summary_text(view, ()).startswith(expected)


def test_the_states_are_told_apart_without_colour() -> None:
    views = [make_view(state=state) for state in STATES]
    assert len({re.sub("#[0-9A-F]{6}", "", render.state_line(view)) for view in views}) == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "200/400 · 1:05 < 1:10 · 20 it/s"),
        ({"total_steps": None, "eta_s": math.nan}, "200 steps · 1:05 · 20 it/s"),
        ({"total_steps": 150}, "200 steps · 1:05 < 1:10 · 20 it/s"),
        ({"state": "finished"}, "200/400 · 1:05 · 20 it/s"),
        ({"elapsed_s": 3723.4, "eta_s": 36000.0}, "200/400 · 1:02:03 < 10:00:00 · 20 it/s"),
        ({"step_ms": 2500.0}, "200/400 · 1:05 < 1:10 · 2.5 s/it"),
        ({"step_ms": 400.0}, "200/400 · 1:05 < 1:10 · 2.5 it/s"),
        ({"step_ms": math.nan}, "200/400 · 1:05 < 1:10"),
        ({"step": 1_234_567, "total_steps": 2_000_000, "eta_s": math.nan, "step_ms": 0.5},
         "1,234,567/2,000,000 · 1:05 · 2,000 it/s"),
    ],
)  # fmt: skip
def test_progress_says_how_far_and_how_long(changes: dict[str, Any], expected: str) -> None:
    assert _text.format_progress(make_view(**changes)) == expected


@pytest.mark.parametrize(
    ("state", "step", "total_steps", "width"),
    [
        ("running", 100, 400, "25.0%"),
        ("running", 500, 400, "100.0%"),
        ("running", 100, None, "0.0%"),
        ("finished", 100, None, "100.0%"),
        ("stopped", 100, 400, "25.0%"),
    ],
)
def test_the_bar_is_as_long_as_the_run_is_far(
    state: str, step: int, total_steps: int | None, width: str
) -> None:
    view = make_view(state=state, step=step, total_steps=total_steps)
    assert f"width:{width}" in render.state_line(view)


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (_text.format_loss, 1.3, "1.300"),
        (_text.format_loss, 12.3456, "12.35"),
        (_text.format_loss, 1234.5, "1,234"),
        (_text.format_loss, 0.0, "0.000"),
        (_text.format_loss, 1.23e-5, "1.230e-05"),
        (_text.format_loss, -math.inf, "−∞"),
        (_text.format_rate, 5055.4, "5,055"),
        (_text.format_rate, 12.5, "12.5"),
        (_text.format_ms, 1250.0, "1,250"),
        (_text.format_ms, 50.0, "50.0"),
        (_text.format_ms, 0.25, "0.25"),
        (_text.format_percent, 0.183, "18 %"),
        (_text.format_size, 9.25, "9.2 GiB"),
        (_text.format_size, 0.5, "512 MiB"),
        (_text.format_time, math.inf, "∞"),
        *((f, math.nan, "–") for f in (
            _text.format_loss, _text.format_rate, _text.format_ms, _text.format_percent,
            _text.format_size, _text.format_time,
        )),
    ],
)  # fmt: skip
def test_numbers_are_short_text(
    function: Callable[[float], str], value: float, expected: str
) -> None:
    assert function(value) == expected


def test_six_tiles_stand_in_one_row() -> None:
    html = render.tiles(make_view())
    document = Document(html)
    assert document.tags.count("td") == 6
    assert document.tags.count("tr") == 1
    assert document.text == (
        f"loss {make_view().loss:.4f} ▼ best so far samples/s 5,055 1,264 per rank "
        "step 50.0 ms 70 % compute data wait 3 % 1.5 ms of a step comm 27 % "
        "1.05 MB sent for 4.2 MB peak memory 9.2 GiB on rank 0"
    )


def test_unknown_numbers_are_dashes() -> None:
    html = render.tiles(make_empty_view())
    assert "nan" not in html
    assert Document(html).text.count("–") == 9
    assert rows_of(render.ranks_table(make_empty_view(1))) == [
        ["0", "–", "0", "–", "–", "–", "–", "–", "–", "–", "○ starting"]
    ]


def test_the_loss_is_compared_with_its_best() -> None:
    assert "▼ best so far" in Document(render.tiles(make_view(loss=0.5, best_loss=0.5))).text
    assert "▲ best 0.5000" in Document(render.tiles(make_view(loss=0.6, best_loss=0.5))).text
    assert "▲ best -1.500" in Document(render.tiles(make_view(loss=-1.0, best_loss=-1.5))).text


@pytest.mark.parametrize(("num_lost", "since"), [(0, None), (2, None), (3, 198), (200, None)])
def test_a_loss_that_stays_nonfinite_is_said(num_lost: int, since: int | None) -> None:
    raw = make_view().loss_raw.copy()
    raw[200 - num_lost :] = math.nan
    view = make_view(loss_raw=raw)
    assert _text.nonfinite_since(view) == since
    assert ("✖ NaN/∞ since 198" in Document(render.tiles(view)).text) == (since is not None)
    assert ("✖ loss not finite since step 198" in _text.text_line(view)) == (since is not None)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_few_ranks_have_a_row_each(num_ranks: int) -> None:
    rows = rows_of(render.ranks_table(make_view(num_ranks)))
    assert [row[0] for row in rows] == [str(rank) for rank in range(num_ranks)]
    assert rows[0][1:7] == ["cuda:0", "200", "50.0", "35.0", "1.5", "13.5"]
    assert rows[0][8:] == ["1,264", "9.2 GiB", "● running"]


@pytest.mark.parametrize("num_ranks", [9, 64])
def test_many_ranks_are_shown_by_their_extremes(num_ranks: int) -> None:
    ranks = tuple(make_rank(r, compute_ms=30.0 + r) for r in reversed(range(num_ranks)))
    view = make_view(ranks=ranks)
    rows = rows_of(render.ranks_table(view))
    middle = (num_ranks - 1) // 2
    assert [row[0] for row in rows] == [f"{num_ranks - 1} slowest", f"{middle} median", "0 fastest"]
    assert len(rows_of(render.ranks_table(view, is_full=True))) == num_ranks


def test_many_ranks_do_not_hide_one_that_is_gone() -> None:
    ranks = tuple(make_rank(r, state="lost" if r == 7 else "running") for r in range(64))
    rows = rows_of(render.ranks_table(make_view(ranks=ranks)))
    assert [row[0] for row in rows if row[-1] == "✖ lost"] == ["7"]
    everyone = tuple(make_rank(r, state="failed") for r in range(64))
    assert len(rows_of(render.ranks_table(make_view(ranks=everyone)))) == 3


def test_a_slow_rank_is_marked_in_words() -> None:
    ranks = (make_rank(0, compute_ms=28.5), make_rank(1, compute_ms=43.6))
    view = make_view(ranks=ranks)
    assert [row[7] for row in rows_of(render.ranks_table(view))] == ["1.00 ×", "▲ slow 1.50 ×"]
    assert _text.slow_ranks(view) == [1]
    assert "1.50 x slow" in _text.summary_text(view, ())


def test_the_threshold_of_slow_is_not_slow_and_a_rank_alone_never_is() -> None:
    ranks = (make_rank(0, compute_ms=28.5), make_rank(1, compute_ms=43.5))
    assert _text.slow_ranks(make_view(ranks=ranks)) == []
    assert "slow" not in render.ranks_table(make_view(ranks=ranks))
    assert "slow" not in _text.summary_text(make_view(ranks=ranks), ())
    assert _text.slow_ranks(make_view(1)) == []
    assert rows_of(render.ranks_table(make_view(1)))[0][7] == "–"


def test_hosts_are_shown_when_there_are_several() -> None:
    ranks = (make_rank(0), make_rank(1, host="node2", device="cuda:0"))
    rows = rows_of(render.ranks_table(make_view(ranks=ranks)))
    assert [row[1] for row in rows] == ["node1 cuda:0", "node2 cuda:0"]
    titles = Document(render.ranks_table(make_view(ranks=ranks))).of("title")
    assert "node2, process 4001" in titles


def test_logs_are_labelled_by_their_ranks() -> None:
    document = Document(render.log_blocks(BLOCKS, 4, max_chars=1000, is_live=False))
    assert document.text == "rank 0 epoch 1 saved ranks 1–3 epoch 1"
    assert document.tags.count("details") == 2
    assert len(document.of("open")) == 1
    same = (OutputBlock((0, 1, 2, 3), "hello\n"),)
    document = Document(render.log_blocks(same, 4, max_chars=1000, is_live=False))
    assert document.text == "all ranks hello"
    assert "details" not in document.tags
    assert "overflow:auto" in " ".join(document.of("style"))


def test_live_logs_neither_fold_nor_scroll_by_themselves() -> None:
    document = Document(render.log_blocks(BLOCKS, 4, max_chars=1000, is_live=True))
    assert "details" not in document.tags
    assert "overflow:auto" not in " ".join(document.of("style"))
    assert "no rank printed" in render.log_blocks((), 4, max_chars=1000, is_live=True)


def test_of_long_logs_the_newest_whole_lines_are_kept() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    kept = _text.tail(text, 100)
    first, *rest = kept.splitlines()
    assert rest == [f"line {i}" for i in range(1000 - len(rest), 1000)]
    assert first == f"… {1000 - len(rest)} earlier lines are not shown"
    assert _text.tail(text, len(text)) == text
    blocks = tuple(OutputBlock((rank,), text) for rank in range(4))
    assert len(render.log_blocks(blocks, 4, max_chars=8000, is_live=False)) < 12_000


def test_notes_metrics_and_errors_are_shown() -> None:
    view = make_view(state="failed", error="rank 2: ValueError: no\n  in line 3")
    assert Document(render.notes_list(view)).text == "1 model broadcast"
    assert Document(render.metrics_line(view)).text == "lr 0.0003 · accuracy 0.7132"
    assert Document(render.error_text(view)).text == "rank 2: ValueError: no in line 3"
    assert render.error_text(make_view()) == ""


def test_what_is_not_ours_is_escaped_everywhere() -> None:
    rank = make_rank(0, host=HOSTILE, device=HOSTILE, state=HOSTILE)
    view = make_view(
        name=HOSTILE,
        recipe=HOSTILE,
        state=HOSTILE,
        metrics={HOSTILE: 1.0},
        notes=(HOSTILE,),
        error=HOSTILE,
        ranks=(rank, make_rank(1)),
    )
    document = Document(every_html(view, (OutputBlock((0,), HOSTILE),)))
    assert set(document.tags) <= TAGS
    assert {name for name, _ in document.attributes} <= ATTRIBUTES
    assert document.text.count("<script>alert(1)</script>") >= 9


@pytest.mark.parametrize("view", every_view())
def test_nothing_is_used_that_an_untrusted_notebook_strips(view: RunView) -> None:
    html = every_html(view)
    document = Document(html)
    assert set(document.tags) <= TAGS
    assert {name for name, _ in document.attributes} <= ATTRIBUTES
    assert not re.search(r"<svg|<script|<style|class=|javascript:|url\(", html)
    assert "nan" not in document.text.replace("NaN/∞", "").lower()


def test_contrast_is_measured_rightly() -> None:
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21.0)
    assert contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)


def test_every_colour_is_readable_on_light_and_dark() -> None:
    html = "".join(every_html(view) for view in every_view())
    colours = set(re.findall(r"#[0-9a-fA-F]{3,8}\b", html))
    assert colours == {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"}
    for colour in colours:
        assert contrast(colour, "#FFFFFF") >= 3.0
        assert contrast(colour, "#111111") >= 3.0
    for value in re.findall(r"[;\"](?:color|background):([^;\"]+)", html):
        assert value in {"transparent", "inherit"} or value.startswith(("#", "var(", "rgba(127"))


def test_the_charts_own_colours_are_readable_on_its_white() -> None:
    for colour in (render.BLUE, render.GREEN, chart._ALARM, chart._INK, chart._MUTED):
        assert contrast(colour, "#FFFFFF") >= 3.0


def test_a_text_line_is_one_line() -> None:
    view = make_view(name="run\n3", notes=("a\nb",))
    assert _text.text_line(view) == (
        f"● running · 200/400 · 1:05 < 1:10 · 20 it/s · loss {view.loss:.4f} · "
        "5,055 samples/s · comm 27 %"
    )
    assert "\n" not in _text.text_line(make_empty_view())


def test_the_plain_summary_says_it_all() -> None:
    view = make_view(state="failed", error="rank 1: ValueError: no")
    text = _text.summary_text(view, BLOCKS)
    for part in ("run-3  --amp bf16", "rank 1: ValueError: no", "best", "peak memory 9.2 GiB",
                 "accuracy 0.7132", "note: 1 model broadcast", "── ranks 1–3 ──"):  # fmt: skip
        assert part in text
    rows = [line for line in text.splitlines() if re.match(r"\d  ", line)]
    assert len(rows) == 4
    assert len({line.index("running") for line in rows}) == 1


def test_the_plain_summary_keeps_all_that_was_printed_when_asked() -> None:
    blocks = (OutputBlock((0,), "x" * 10_000 + "\nlast\n"),)
    assert len(_text.summary_text(make_view(), blocks)) < 6000
    assert "x" * 10_000 in _text.summary_text(make_view(), blocks, max_log_chars=None)


def test_the_bundle_has_a_card_a_picture_and_text() -> None:
    view = make_view(state="finished")
    bundle = summary_bundle(view, BLOCKS)
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    html, png = str(bundle["text/html"]), base64.b64decode(str(bundle["image/png"]))
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert len(png) <= 40_000
    document = Document(html)
    source = next(value for value in document.of("src"))
    assert source == f"data:image/png;base64,{bundle['image/png']}"
    assert document.of("alt") == [alt_text(view)]
    assert "✔ finished" in document.text
    assert "epoch 1" in document.text
    assert bundle["text/plain"] == _text.summary_text(view, BLOCKS)
    assert summary_bundle(view, BLOCKS, log_scale=True)["image/png"] != bundle["image/png"]


def test_a_card_of_many_ranks_folds_them_at_the_end_only() -> None:
    final = Document(card(make_view(64, state="stopped"), (), b""))
    assert "all 64 ranks" in final.text
    assert final.text.count("node1") == 0
    assert final.tags.count("details") == 1
    assert "details" not in Document(card(make_view(64), (), b"")).tags


def test_a_card_that_is_drawn_again_keeps_less_of_the_logs() -> None:
    blocks = (OutputBlock((0,), "line\n" * 20_000),)
    live, final = card(make_view(), blocks, b""), card(make_view(state="finished"), blocks, b"")
    assert live.count("line\n") < 2_000
    assert 10_000 < final.count("line\n") < 15_000


def test_a_failed_card_says_why_above_the_numbers() -> None:
    view = make_view(state="failed", error="rank 1: ValueError: no")
    text = Document(card(view, (), b"")).text
    assert text.index("✖ failed") < text.index("ValueError") < text.index("samples/s")


def test_a_real_run_is_drawn_from_its_events() -> None:
    state = RunState("run-1", ranks=[0, 1])
    for rank in (0, 1):
        state.handle(RankStarted(rank, 10 + rank, "here", "cpu", 0.0))
        state.handle(Total(rank, 4))
        columns = {
            "step": [1.0, 2.0],
            "time_s": [0.1, 0.2],
            "loss": [2.0, math.inf],
            "samples": [32.0, 32.0],
            "step_ms": [100.0, 100.0],
            "data_ms": [10.0, 10.0],
            "comm_ms": [20.0, 20.0],
            "lr": [0.1, 0.1],
        }
        state.handle(StepBatch(rank, columns, peak_bytes=2**30))
    state.end("finished")
    view = dataclasses.replace(state.view(), elapsed_s=1.0)
    bundle = summary_bundle(view, ())
    assert "2/4 · 0:01 · 10 it/s" in Document(str(bundle["text/html"])).text
    assert "640 samples/s" in str(bundle["text/plain"])
