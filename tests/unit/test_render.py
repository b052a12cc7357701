"""A run as HTML, part by part: what is said of states, numbers, ranks and logs."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from documents import BLOCKS, STATES, Document, rows_of
from run_views import make_empty_view, make_rank, make_view, with_loss

from dtkit import _format
from dtkit.output import MAX_CHARS, OutputBlock, RankOutput, tail
from dtkit.views import render, words

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(("state", "expected"), STATES.items())
def test_a_state_is_a_sign_and_a_word(state: str, expected: str) -> None:
    view = make_view(state=state)
    assert Document(render.state_line(view)).text.startswith(expected)
    assert words.text_line(view).startswith(expected)
    assert words.summary_text(view, ()).startswith(expected)


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
    assert words.format_progress(make_view(**changes)) == expected


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
        (_format.format_memory, 12, "12 B"),
        (_format.format_memory, 1.5 * 2**30, "1.5 GiB"),
        (_format.format_loss, 1.3, "1.300"),
        (_format.format_loss, 12.3456, "12.35"),
        (_format.format_loss, 1234.5, "1,234"),
        (_format.format_loss, 0.0, "0.000"),
        (_format.format_loss, 1.23e-5, "1.230e-05"),
        (_format.format_loss, -math.inf, "−∞"),
        (_format.format_rate, 5055.4, "5,055"),
        (_format.format_rate, 12.5, "12.5"),
        (_format.format_ms, 1250.0, "1,250"),
        (_format.format_ms, 50.0, "50.0"),
        (_format.format_ms, 0.25, "0.25"),
        (_format.format_percent, 0.183, "18 %"),
        (_format.format_size, 9.25, "9.2 GiB"),
        (_format.format_size, 0.5, "512 MiB"),
        (_format.format_time, math.inf, "∞"),
        *((f, math.nan, "–") for f in (
            _format.format_loss, _format.format_rate, _format.format_ms, _format.format_percent,
            _format.format_size, _format.format_time,
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
    raw = make_view().loss_curve.lines["raw"].copy()
    raw[200 - num_lost :] = math.nan
    view = with_loss(make_view(), raw)
    assert words.nonfinite_since(view) == since
    assert ("✖ NaN/∞ since 198" in Document(render.tiles(view)).text) == (since is not None)
    assert ("✖ loss not finite since step 198" in words.text_line(view)) == (since is not None)


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
    assert words.slow_ranks(view) == [1]
    assert "1.50 x slow" in words.summary_text(view, ())


def test_the_threshold_of_slow_is_not_slow_and_a_rank_alone_never_is() -> None:
    ranks = (make_rank(0, compute_ms=28.5), make_rank(1, compute_ms=43.5))
    assert words.slow_ranks(make_view(ranks=ranks)) == []
    assert "slow" not in render.ranks_table(make_view(ranks=ranks))
    assert "slow" not in words.summary_text(make_view(ranks=ranks), ())
    assert words.slow_ranks(make_view(1)) == []
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


def test_what_was_cut_before_is_counted_along() -> None:
    output, num_lines = RankOutput(), MAX_CHARS // 50
    for i in range(num_lines):
        output.write(f"{i} {'x' * 100}\n")
    note, first, *_ = tail(output.text, 1000).splitlines()
    assert note == f"… {int(first.split()[0]):,} earlier lines are not shown"


def test_an_option_in_a_note_stays_in_one_line() -> None:
    html = render.notes_list(make_view(notes=("try --accumulate 4 <b>",)))
    assert '<span style="white-space:nowrap">--accumulate 4</span> &lt;b&gt;' in html


def test_of_long_logs_the_newest_whole_lines_are_kept() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    kept = tail(text, 100)
    first, *rest = kept.splitlines()
    assert rest == [f"line {i}" for i in range(1000 - len(rest), 1000)]
    assert first == f"… {1000 - len(rest)} earlier lines are not shown"
    assert tail(text, len(text)) == text
    blocks = tuple(OutputBlock((rank,), text) for rank in range(4))
    assert len(render.log_blocks(blocks, 4, max_chars=8000, is_live=False)) < 12_000


def test_notes_metrics_and_errors_are_shown() -> None:
    view = make_view(state="failed", error="rank 2: ValueError: no\n  in line 3")
    assert Document(render.notes_list(view)).text == "1 model broadcast"
    assert Document(render.metrics_line(view)).text == "lr 0.0003 · accuracy 0.7132"
    assert Document(render.error_text(view)).text == "rank 2: ValueError: no in line 3"
    assert render.error_text(make_view()) == ""
