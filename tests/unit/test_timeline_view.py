"""A timeline in the notebook: picture, tables and advice, from a run's folder."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from test_archive import make_run, steps_of
from test_trace_files import write_rows
from traces import Plan, make_traces

from dtkit.driver.runs.archive import runs
from dtkit.driver.runs.create import create_run
from dtkit.driver.runs.timeline import Timeline, timeline_of
from dtkit.errors import InvalidInputError
from dtkit.events import RankStarted, encode
from dtkit.options import RunOptions
from dtkit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dtkit.driver.runs.run import Run

CELL = "x = 1\n"


def make_finished(folder: Path, name: str, plans: Sequence[Plan], cell: str = CELL) -> Run:
    """Return a finished run with a timeline, each rank of which trained 800 samples a second."""
    run = create_run(
        folder, cell, recipe=Recipe(), options=RunOptions(), ranks=range(len(plans)), name=name
    )
    write_rows(run.dir, make_traces(plans, num_steps=10))
    for rank in run.ranks:
        events = [RankStarted(rank, 1, "here", "cpu", run.start_unix_s), steps_of(rank, 1, 10)]
        (run.dir / f"rank-{rank}.jsonl").write_bytes(b"\n".join(map(encode, events)))
    run.end("finished")
    return runs(folder)[name]


def test_a_timeline_shows_shares_stragglers_and_advice(tmp_path: Path) -> None:
    timeline = make_finished(tmp_path, "a", [Plan(), Plan(data=31)]).timeline()
    text = repr(timeline)
    assert "data wait" in text
    assert "rank 1" in text
    assert "waits 44% of the step (29.0 ms) for rank 1, whose DataLoader" in text
    shown = timeline._repr_mimebundle_()
    assert "its DataLoader" in shown["text/html"]
    assert 'alt="Phases of 2 ranks in steps 7 to 10' in shown["text/html"]
    picture = Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_over_several_hosts_ranks_are_named_with_theirs(tmp_path: Path) -> None:
    run = make_finished(tmp_path, "a", [Plan(), Plan(data=31)])
    traces = make_traces([Plan(), Plan(data=31)])
    for trace, host in zip(traces, ("alpha", "beta"), strict=True):
        trace.head = replace(trace.head, host=host, error_ns=120_000 * trace.head.rank)
    write_rows(run.dir, traces)
    timeline = run.timeline()
    assert "for rank 1 on beta, whose DataLoader" in timeline.advice[0]
    assert timeline.facts()["waited most for"].startswith("rank 1 on beta, ")
    assert timeline.facts()["hosts' clocks"] == "compared within 0.12 ms"
    assert "0 on alpha" in repr(timeline)
    zoomable = pytest.importorskip("anywidget") and timeline.zoomable()
    assert zoomable.ranks == ["rank 0 on alpha", "rank 1 on beta"]
    zoomable.close()


def test_no_advice_when_nothing_is_wrong(tmp_path: Path) -> None:
    timeline = make_finished(tmp_path, "a", [Plan(), Plan()]).timeline()
    assert timeline.advice == ()
    assert "▲" not in timeline._repr_mimebundle_()["text/html"]


def test_the_scaling_is_that_against_one_rank_of_the_same_cell(tmp_path: Path) -> None:
    body = "y = 2\n"
    make_finished(tmp_path, "other", [Plan()])
    one = make_finished(tmp_path, "one", [Plan()], f"# %%dist_train --ranks 0\n{body}")
    two = make_finished(tmp_path, "two", [Plan()] * 2, f"# %%dist_train\n{body}")
    assert one.timeline().efficiency is None
    timeline = two.timeline()
    assert timeline.efficiency == pytest.approx(1.0)
    assert timeline.facts()["scaling efficiency"] == "100% of 2 × run 'one'"


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    both = timeline_of(
        make_finished(tmp_path, "slow", [Plan(), Plan(data=31)]),
        make_finished(tmp_path, "fast", [Plan(), Plan()]),
    )
    assert not isinstance(both, Timeline)
    text = repr(both)
    assert text.splitlines()[0].split() == ["slow", "fast"]
    assert "waited most for" in text
    assert "slow: The other rank waits" in text
    assert both._repr_mimebundle_()["text/html"].count("<img") == 2


def test_a_run_without_a_timeline_says_how_to_get_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "none")
    run.end("finished")
    with pytest.raises(InvalidInputError, match="--timeline"):
        run.timeline()
