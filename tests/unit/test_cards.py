"""A run as one card and as text: that it says all, is safe, and can be read."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re

import numpy as np
import pytest
from documents import ATTRIBUTES, BLOCKS, HOSTILE, TAGS, Document, every_html, every_view
from PIL import Image
from run_views import contrast, make_empty_view, make_rank, make_view

from dtkit.events import RankStarted, StepBatch, Total
from dtkit.output import OutputBlock
from dtkit.telemetry import Curve, RunState, RunView
from dtkit.views import plot, words
from dtkit.views.alt import alt_text
from dtkit.views.summary import card, summary_bundle


def test_a_summary_has_every_curve_that_tells_something_folded() -> None:
    step = np.arange(1.0, 11.0)
    curves = {
        "learning rate": Curve(step, {"learning rate": np.full(10, 0.1)}),
        "accuracy": Curve(step, {"accuracy": step / 10}),
        **{f"metric {i}": Curve(step, {"it": step * i}) for i in range(1, 10)},
    }
    view = make_view(2, state="finished")
    document = Document(str(summary_bundle(view, (), curves)["text/html"]))
    assert "more charts: accuracy, metric 1" in document.text
    assert "(and 2 more, of which the history has the numbers)" in document.text
    alts = [value or "" for name, value in document.attributes if name == "alt"]
    assert len(alts) == 5
    assert "Accuracy" in alts[1]
    assert "Metric 7" in alts[4]
    assert not any("earning rate" in alt for alt in alts)


def test_a_run_without_a_step_says_so_instead_of_numbers() -> None:
    ended = dataclasses.replace(make_empty_view(2), state="finished")
    bundle = summary_bundle(ended, BLOCKS)
    document = Document(str(bundle["text/html"]))
    assert set(bundle) == {"text/html", "text/plain"}
    assert "no optimizer made a step" in document.text
    assert "epoch 1" in document.text
    assert not {"img", "table"} & set(document.tags)
    failed = dataclasses.replace(ended, state="failed", error="SyntaxError: here")
    assert "optimizer" not in str(summary_bundle(failed, ())["text/html"])


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
    for colour in (plot.ALARM, plot.INK, plot._MUTED):
        assert contrast(colour, "#FFFFFF") >= 3.0


def test_a_text_line_is_one_line() -> None:
    view = make_view(name="run\n3", notes=("a\nb",))
    assert words.text_line(view) == (
        f"● running · 200/400 · 1:05 < 1:10 · 20 it/s · loss {view.loss:.4f} · "
        "5,055 samples/s · comm 27 %"
    )
    assert "\n" not in words.text_line(make_empty_view())


def test_the_plain_summary_says_it_all() -> None:
    view = make_view(state="failed", error="rank 1: ValueError: no")
    text = words.summary_text(view, BLOCKS)
    for part in ("run-3  --amp bf16", "rank 1: ValueError: no", "best", "peak memory 9.2 GiB",
                 "accuracy 0.7132", "note: 1 model broadcast", "── ranks 1–3 ──"):  # fmt: skip
        assert part in text
    rows = [line for line in text.splitlines() if re.match(r"\d  ", line)]
    assert len(rows) == 4
    assert len({line.index("running") for line in rows}) == 1


def test_the_plain_summary_keeps_all_that_was_printed_when_asked() -> None:
    blocks = (OutputBlock((0,), "x" * 10_000 + "\nlast\n"),)
    assert len(words.summary_text(make_view(), blocks)) < 6000
    assert "x" * 10_000 in words.summary_text(make_view(), blocks, max_log_chars=None)


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
    assert bundle["text/plain"] == words.summary_text(view, BLOCKS)
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
